"""An encoder and what is done with it: loading, layers, vectors of every depth, projections."""
