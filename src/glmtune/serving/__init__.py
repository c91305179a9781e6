"""An OpenAI-style server of a base and its adapters.

`load` makes the models of a command line ready; `scheduler` lets requests join and leave the batch;
`engine` turns a request into prompts and tokens into text; `schema` says what a request and an
answer hold, and `http` has the routes; `run` is the verb. `pages` adds the page to the routes, and
`watch` follows a training run for it, which `watching` serves without any model.
"""
