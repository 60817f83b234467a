"""A client and an environment for rlm, as a package of their own."""
