"""
The meaning of every room in plain NumPy: slow, float64, obviously right.

One file a room, named like the room. Every other side must equal these functions: exactly where the
result is integer, within the per-element bound that they return where it is a float.
"""
