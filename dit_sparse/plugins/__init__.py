"""Other engines' conventions, thinly over ``dit_sparse.sdpa``."""
