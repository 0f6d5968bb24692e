"""One output: the folder or URL that a job draws its dataset into.

names        the files of an output
plan         the shards of a job
lease        which run may write now
pulse        the heartbeat of that run, and progress its content
identity     what can change a byte: compared when a run resumes
record       job.yaml and plan.parquet
receipts     what proves a shard
lifecycle    check, begin, end and remove an output
formats/     a shard as a file
image_file   an image as a file, with its parameters
reader       the dataset, read back
verify       checks all of it
"""
