"""`picto`: drawings of many styles and artists, for experiments on how far an encoder generalises."""
