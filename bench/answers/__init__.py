"""What answers of a certain kind cost, next to others."""
