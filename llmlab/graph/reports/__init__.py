"""What passes did, how two graphs differ, and how both are shown. Knows nodes by name only."""
