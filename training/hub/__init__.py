"""What goes to the Hub and what comes from it."""
