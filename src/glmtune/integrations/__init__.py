"""glmtune's models in other projects' programs; each module needs that project installed."""
