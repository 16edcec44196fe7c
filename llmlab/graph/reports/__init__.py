"""What passes did, how two graphs differ, why a pass did or didn't fire, and how all of that is shown.

Each report draws itself with what `render` holds. Parts see a graph as nodes with names: they import neither `Graph`
nor any other room, so that `Graph` can carry its history.
"""
