"""What a program is going to read, told to the fetcher, so that it is there in time.

`consumer.Consumer` says it; `places` finds out which cache and dataset a program's paths are in; `orders` computes what
torch's samplers give; `reading` is for whatever reads a list of files. Hints are advice: late, wrong or missing ones
make reads slower, never wrong. Nothing here is imported by a reader that gives none.
"""
