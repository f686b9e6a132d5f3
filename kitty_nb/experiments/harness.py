"""Tasks of lm-evaluation-harness, run against a server."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import lm_eval
from anyio import from_thread
from anyio.to_thread import run_sync
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from kitty_nb.client.protocol import ask_each, post, props
from kitty_nb.errors import ExperimentError, KittyError
from kitty_nb.experiments.likelihood import Likelihoods
from kitty_nb.experiments.metrics import known
from kitty_nb.experiments.statistics import score_interval

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval.api.instance import Instance

    from kitty_nb.experiments.likelihood import Interval, Piece
    from kitty_nb.experiments.quality import HarnessTask

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # parameters that a task may set


async def run_harness_task(
    task: HarnessTask, http: httpx.AsyncClient, *, slots: int | None, seed: int
) -> tuple[float, Interval | None]:
    """Run a task against a server; return its score, with a 95 % interval if that is a mean.

    Raises:
        KittyError: The task can't be run, or the server rejects a request.
        httpx.HTTPError: The connection fails.
    """
    model = _ServedModel(http, slots or 1, seed)
    await model.prepare()
    try:
        return await run_sync(_evaluate, task, model)
    except (KittyError, httpx.HTTPError):
        raise
    except Exception as error:  # whatever a task's own code raises
        raise ExperimentError(
            f"The task {task.name!r} of lm-evaluation-harness failed: {error or repr(error)}"
        ) from error


class _ServedModel(TemplateLM):
    """Adapter through which the harness, in a worker thread, queries the served model.

    The harness splits and scores texts by its own rules; the tokens are the server's.
    """

    def __init__(self, http: httpx.AsyncClient, slots: int, seed: int) -> None:
        super().__init__()
        self._http, self._texts = http, Likelihoods(http)
        self._slots, self._seed = slots, seed
        self._pieces: dict[int, Piece] = {}
        self._first = 0

    async def prepare(self) -> None:
        """Look up the token that begins a text."""
        end = (await props(self._http)).get("eos_token") or "\n"
        begins = await self._texts.tokens("") or await self._texts.tokens(end, add_special=False)
        self._first = begins[0][0]

    @property
    def eot_token_id(self) -> int:
        """The token that stands in for an empty context."""
        return self._first

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache, which isn't used."""
        return "llama-server"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokenize a text."""
        special = add_special_tokens is not False
        tokens = from_thread.run(partial(self._texts.tokens, string, add_special=special))
        self._pieces.update(tokens)
        return [token for token, _ in tokens]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Format messages with the model's chat template."""
        request = {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
        return str(
            from_thread.run(post, self._http, "/apply-template", request, "prompt")["prompt"]
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return from_thread.run(self._likelihoods, [tokens for _, *tokens in requests])

    def loglikelihood_rolling(self, *_: object, **__: object) -> list[float]:
        """Reject tasks that measure the likelihood of whole documents."""
        raise ExperimentError(
            "This task measures perplexity, where lower is better, unlike quality. Use"
            " quality=Perplexity({prompt: text}) instead."
        )

    def generate_until(self, requests: list[Instance], **_: object) -> list[str]:
        """Generate answers up to a stop sequence."""
        return from_thread.run(self._continued, [one.args for one in requests])

    async def _likelihoods(self, pairs: list[list[list[int]]]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding yields it."""
        found = []
        for before, after in pairs:
            whole = [*before, *after]
            each = [
                await self._texts.token(whole[:end], whole[end], self._pieces[whole[end]])
                for end in range(len(before), len(whole))
            ]
            found.append((math.fsum(one for one, _ in each), all(top for _, top in each)))
        return found

    async def _continued(self, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
        answers = [""] * len(asked)

        async def ask(index: int) -> None:
            prompt, given = asked[index]
            wanted: Mapping[str, Any] = normalize_gen_kwargs(given)
            request = {
                "prompt": prompt,
                "n_predict": wanted["max_gen_toks"],
                "stop": [text for text in wanted["until"] if text],
                "seed": self._seed,
                "temperature": 0.0,
                **{name: wanted[name] for name in _SAMPLING if name in wanted},
            }
            body = await post(self._http, "/completion", request, "content")
            answers[index] = body["content"]

        await ask_each(range(len(asked)), self._slots, ask)
        return answers


def _evaluate(task: HarnessTask, model: _ServedModel) -> tuple[float, Interval | None]:
    """Run a task. Blocking."""
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task.name],
        num_fewshot=task.shots,
        limit=task.limit,
        apply_chat_template=task.chat,
        task_manager=TaskManager(
            include_path=task.include_path or None, include_defaults=not task.include_path
        ),
        bootstrap_iters=0,  # would fork this process
        random_seed=None,  # leave the seeds of this process alone
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    numbers = {**found["results"], **found.get("groups", {})}.get(task.name)
    if numbers is None:
        raise ExperimentError(
            f"{task.name} has no overall score. Use one of its tasks:"
            f" {', '.join(found['results'])}."
        )
    scores = {
        key.removesuffix(",none"): value
        for key, value in numbers.items()
        if "," in key and "_stderr," not in key
    }
    name = known(task.metric, scores) if task.metric else next(iter(scores))
    metric, _, chosen = name.partition(",")
    if found["higher_is_better"].get(task.name, {}).get(metric) is False:
        raise ExperimentError(
            f"{metric} is better when lower, unlike quality. Use another metric of {task.name}:"
            f" {', '.join(scores)}."
        )
    score = float(scores[name])
    each = [
        one[metric]
        for samples in found["samples"].values()
        for one in samples
        if one["filter"] == (chosen or "none") and isinstance(one.get(metric), int | float)
    ]
    is_mean = each and math.isclose(math.fsum(each) / len(each), score, abs_tol=1e-9)
    return score, score_interval(each) if is_mean else None
