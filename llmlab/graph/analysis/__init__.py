"""What a part of a graph is, found out by running it or by walking it; nothing here changes a graph."""
