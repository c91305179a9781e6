"""glmtune's models inside other projects' programs; each module needs that project installed."""
