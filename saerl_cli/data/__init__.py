"""Documents, rows, prompts, preference pairs and questions: users' files, the Hub, the planted language."""
