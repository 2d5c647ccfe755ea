"""What is different in each training stage."""
