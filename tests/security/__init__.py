"""Secrets stay out of every file, what is loaded is data, and no path leaves its directory."""
