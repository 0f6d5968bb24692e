"""Ray Data's pool of actors without those that are dead for good, so that others are started.

Ray restarts a drawing actor that dies, except one that it was made to end. Ray Data keeps the place
of such an actor (ray issue 62746), and a pool of them waits without end.
"""

from typing import Any

from ray.core.generated.gcs_pb2 import ActorTableData
from ray.data._internal.execution.execution_callback import ExecutionCallback


class Refill(ExecutionCallback):  # type: ignore[misc]  # mypy does not read Ray
    """Gives up the places of dead actors, step by step; Ray Data then starts as many again."""

    def on_execution_step(self, executor: Any) -> None:
        """Give up actors that are dead and idle.

        One that is dead and has shards in flight ends the run, by their errors.
        """
        for operator in executor._topology:
            for pool in operator.get_autoscaling_actor_pools():
                for actor, state in list(pool._running_actors.items()):
                    dead = actor._get_local_state() == ActorTableData.DEAD
                    if dead and not state.num_tasks_in_flight:
                        pool._release_running_actor(actor)
