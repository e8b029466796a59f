"""What runs for every element, in the language that numba compiles; imported only to be compiled."""
