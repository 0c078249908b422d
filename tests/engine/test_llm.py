"""`LLM` from Python: batches, reuse, errors of the caller, and ranks that fail."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shardwright.engine.llm import LLM
from shardwright.engine.request import SamplingParams
from shardwright.errors import FileError, RankError, UsageError

QUESTIONS = ["What is the capital of France?", "What is the capital of Italy?"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    with LLM(tp=2) as llm:
        yield llm


def test_a_batch_gives_what_its_prompts_give_alone(llm: LLM) -> None:
    """Greedy choices of a confident model: the batch moves only last bits of the logits."""
    params = SamplingParams(max_tokens=8)
    together = llm.generate(QUESTIONS, params)
    assert together[0].text == "The capital of France is Paris."
    assert together[0].finish == "stop"
    assert [llm.generate(question, params)[0] for question in QUESTIONS] == together


def test_ids_and_raw_text_are_taken_as_they_are(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    ids = llm.source.tokenizer.encode("The capital of France is")
    assert llm.generate(ids, params) == llm.generate("The capital of France is", params, raw=True)
    assert llm.generate([ids], params)[0].prompt_token_ids == ids


def test_a_refused_prompt_leaves_the_ranks_usable(llm: LLM) -> None:
    with pytest.raises(UsageError, match="there is nothing to continue"):
        llm.generate(["fine", ""])
    with pytest.raises(UsageError, match="the model has 49152 words"):
        llm.generate([1, 49152])
    with pytest.raises(UsageError, match="context is 8192 tokens"):
        llm.generate([1] * 8192)
    for strange in ([1.0, 2.0], [True], [np.int64(3)], np.array([3, 4]), b"hello", [None], [[3, "a"]]):
        with pytest.raises(UsageError, match=r"prompt=.*(a token id is an int|neither text nor a list of token ids)"):
            llm.generate(strange)
    assert llm.generate([]) == []
    assert llm.generate(QUESTIONS[0], SamplingParams(max_tokens=3))[0].text == "The capital of"


def test_an_interrupted_answer_is_not_the_next_one(llm: LLM) -> None:
    """What the ranks still say of it came first, under the numbers of the next call's prompts."""
    params = SamplingParams(max_tokens=8)
    before = llm.generate(QUESTIONS, params)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Tell me a long story of a dragon.", SamplingParams(max_tokens=200))
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert llm.generate(QUESTIONS, params) == before


def test_threads_take_turns(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    alone = [llm.generate(question, params) for question in QUESTIONS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: llm.generate(question, params), QUESTIONS * 2))
    assert together == alone * 2


@pytest.mark.parametrize("name", ["max_tokens", "seed", "top_k"])
def test_what_counts_is_whole(name: str) -> None:
    """Else the ranks would find out, and end."""
    for value in (2.0, "2", True, None):
        with pytest.raises(UsageError, match=f"{name}={value!r}: it is a whole number"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_what_measures_is_a_number(name: str) -> None:
    for value in ("0.5", True, None, np.float32(0.5), [0.5]):
        with pytest.raises(UsageError, match=rf"{name}={re.escape(repr(value))}: it is a number"):
            SamplingParams(**{name: value})
    assert SamplingParams(**{name: 1}) == SamplingParams(**{name: np.float64(1)})


def test_parameters_are_sampling_params(llm: LLM) -> None:
    with pytest.raises(UsageError, match=r"params=\{'max_tokens': 0\}: they are a SamplingParams"):
        llm.generate(QUESTIONS, {"max_tokens": 0})  # type: ignore[arg-type]


def test_a_missing_model_is_refused_before_a_rank_exists(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no such file or directory"):
        LLM(tmp_path / "nothing.gguf")
    with pytest.raises(UsageError, match="tp=0"):
        LLM(tp=0)
    with pytest.raises(UsageError, match="dtype=int3"):
        LLM(dtype="int3")


def test_closed_while_a_thread_generates() -> None:
    llm = LLM()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(llm.generate, "Tell me a long story of a dragon.", SamplingParams(max_tokens=2000))
        time.sleep(0.5)
        llm.close()
        with pytest.raises(RankError, match=r"ended by close\(\)"):
            under_way.result()


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [deeper for child in children for deeper in descendants(child)]


def test_a_killed_rank_ends_the_job_with_its_name() -> None:
    before = set(descendants(os.getpid()))
    llm = LLM(tp=2)
    started = [pid for pid in descendants(os.getpid()) if pid not in before]
    os.kill(started[-1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        llm.generate(QUESTIONS)
    llm.close()
    assert time.monotonic() - start < 5
    with pytest.raises(RankError, match=r"ended by close\(\).*; start new ones"):
        llm.generate(QUESTIONS)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
