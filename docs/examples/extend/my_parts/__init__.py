"""Parts of a run that llmtrain does not have; docs/extending.md tells of them."""
