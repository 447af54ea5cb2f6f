"""What a run learns from: beginnings of documents, questions with answers, given sequences."""
