"""`secateur compare`: recipes x patterns x seeds on one model, as a table; other libraries on the same tokens."""
