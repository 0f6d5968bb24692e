"""The batch run: a job's shards through Ray Data. It holds Ray Data's settings and traps.

pipeline       run_job: prepare, resolve, run, finish
flow           the data flow: one loop over the stages
drawing_actor  the drawing stage as Ray Data runs it
blocks         a shard's table as a block, and the wrapper of all other stages
pool           how many actors draw, and where
driver         follows a run: receipts, progress, its end
liveness       progress of the shards in flight, and deaths of actors
stall          when nothing moves any more
refill         other actors for those that are dead for good
metrics        what Prometheus and the logs get
ray_setup      Ray: start or connect, settings
sessions       the folders of Ray's files, of which a few stay
gate           which shards may share an actor
isolation      rows drawn in a child process, which a row may end
redraw         verify --redraw: committed images once more, without Ray
"""
