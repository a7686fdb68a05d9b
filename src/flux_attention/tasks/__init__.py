"""Generated questions in real text, and how one answer is scored: for training and evaluation alike."""
