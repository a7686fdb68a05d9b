"""Makes questions in real text, and scores one answer: for training and evaluation alike."""
