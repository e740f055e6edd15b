"""A server of captions and answers in the form of OpenAI's chat completions.

Request -> `protocol` (what is asked) -> `uploads` or `fetching` (the image) -> `batching` (the queue) ->
`answering` (the model) -> `app` (the response). `server` runs it.
"""
