"""The picture of a pool, for people: pictures as frames of JSON, recordings, and the page itself.

`frames` and `recording` make the data, `page` the files, `viewers` the live stream.
"""
