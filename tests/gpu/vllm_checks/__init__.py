"""What `serve.engine: vllm` has to do, check by check. Run by tests/gpu/vllm_engine.py; each gives a line of what it saw, or raises."""

from collections.abc import Awaitable, Callable

from . import adapters, answers, grammars, life, room
from .bench import Bench

CHECKS: tuple[Callable[[Bench], Awaitable[str]], ...] = (
    answers.greedy_answers,
    answers.tokens_come_as_they_are_drawn,
    answers.log_probabilities,
    answers.prompt_log_probabilities,
    answers.stop_ids_and_ends,
    answers.seeds,
    answers.filters_and_penalties,
    grammars.json_schema,
    grammars.our_grammars,
    grammars.bad_grammars,
    adapters.adapters,
    adapters.an_adapters_successor,
    adapters.adapters_that_do_not_fit,
    room.prefix_cache,
    room.abort_in_the_middle,
    answers.parameters_that_cannot_be,
    room.more_than_fits,
    room.counters,
    life.sleep_and_wake,
    life.death_of_the_engine,
    life.a_new_life,
)
