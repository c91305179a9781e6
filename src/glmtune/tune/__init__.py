"""From a file of records to a judged adapter: the verbs one after the other."""
