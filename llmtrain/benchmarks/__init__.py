"""What `llmtrain bench` measures, and the peers it measures beside; nothing of llmtrain imports this."""
