"""Verification: does a model's own probability tell right responses from wrong ones, its own and others'?

    outcome      score(y) = mean log-probability per token of the final answer given the problem alone, without working
    process(h)   score(y) = mean log-probability per token of the first h steps of y given the problem, h = 1..horizon;
                 a shorter response uses all its steps
    p_yes        score(y) = P(yes) / (P(yes) + P(no)) after a question that shows problem and answer (for models that
                 can be asked; instead of the outcome score)

    AUROC              P(score of a right response > score of a wrong one of the same domain), ties one half
    balanced accuracy  (TPR + TNR) / 2 at the threshold that is best on the other half of the problems (two-fold)
    locus              a response is called wrong when its worst step scores below a threshold (chosen in the same way);
                       the locus of the first error is the first such step. Where steps are sums like "7-3=4", the true
                       first error is known by arithmetic, and the two are compared.

The verifier V scores the responses of the author A: V = A is self-verification, else cross-verification. A step is a
non-empty line; in a response of one line, a word. The final answer is what the domain's answer grammar finds; where a
domain has none (code, instructions) the whole response is the answer, and the output says so.

S responses, P problems. AUROC is the Mann-Whitney U over right x wrong pairs (Hanley & McNeil 1982); intervals resample
problems. The paper reports "locus of error, verification horizon and multi-task synergy" without formulas; these
definitions are ours.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from m2rl.analyze import figures, policies
from m2rl.analyze.output import PAPER, Analysis
from m2rl.analyze.policies import TOKENS_PER_BIN, Library, Source, check_models, token_logprobs
from m2rl.command import named
from m2rl.domains.answers import final_answer
from m2rl.policy import Policy
from m2rl.types import InputError, Sample

HORIZON = 8
RESAMPLES = 1000
QUESTION = "{problem}\n\nProposed answer: {answer}\n\nIs the proposed answer correct? Reply with yes or no.\n"


# ---- metrics ---------------------------------------------------------------------------------------------------------


def auroc(scores_S: np.ndarray, right_S: np.ndarray, strata_S: np.ndarray | None = None) -> float:
    """P(right scores above wrong) + P(tie) / 2, by ranks; NaN without both kinds. With strata (integers), over pairs
    inside a stratum: levels of log-probability differ between domains and must not count."""
    scores, right = np.asarray(scores_S, np.float64), np.asarray(right_S, bool)
    strata = np.zeros(len(right), np.int64) if strata_S is None else strata_S
    won, pairs = 0.0, 0
    for stratum in np.unique(strata):
        inside = strata == stratum
        n_right, n_wrong = int(right[inside].sum()), int((~right[inside]).sum())
        _, inverse, counts = np.unique(scores[inside], return_inverse=True, return_counts=True)
        rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each distinct score
        won += float(rank[inverse][right[inside]].sum()) - n_right * (n_right + 1) / 2
        pairs += n_right * n_wrong
    return won / pairs if pairs else float("nan")


def best_threshold(scores_S: np.ndarray, right_S: np.ndarray) -> float:
    """The threshold t with the largest balanced accuracy of `score >= t`: a midpoint, the lowest of several."""
    scores, right = np.asarray(scores_S, np.float64), np.asarray(right_S, bool)
    values, inverse = np.unique(scores, return_inverse=True)
    n_right, n_wrong = max(int(right.sum()), 1), max(int((~right).sum()), 1)
    right_below = np.concatenate([[0], np.bincount(inverse, right, len(values)).cumsum()])
    wrong_below = np.concatenate([[0], np.bincount(inverse, ~right, len(values)).cumsum()])
    best = int(np.argmax(wrong_below / n_wrong - right_below / n_right))
    edges = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    return float(edges[best])


def balanced_accuracy(called_S: np.ndarray, right_S: np.ndarray) -> float:
    """(share of right ones called right + share of wrong ones called wrong) / 2; NaN without both kinds."""
    called, right = np.asarray(called_S, bool), np.asarray(right_S, bool)
    if not right.any() or right.all():
        return float("nan")
    return float((called[right].mean() + (~called[~right]).mean()) / 2)


def folds(problems: Sequence[str]) -> np.ndarray:
    """[S] 0 or 1: every other problem, so that a threshold is never judged on the problems it was chosen on."""
    order = {p: i for i, p in enumerate(dict.fromkeys(problems))}
    return np.array([order[p] % 2 for p in problems], dtype=np.int64)


def thresholds(scores_S: np.ndarray, right_S: np.ndarray, problems: Sequence[str]) -> np.ndarray:
    """[S] the threshold for each response, chosen on the other fold; NaN where that fold lacks right or wrong ones."""
    fold, right = folds(problems), np.asarray(right_S, bool)
    out = np.full(len(right), np.nan)
    for f in (0, 1):
        other = fold != f
        if right[other].any() and not right[other].all():
            out[fold == f] = best_threshold(np.asarray(scores_S)[other], right[other])
    return out


def auroc_resamples(
    scores_S: np.ndarray,
    right_S: np.ndarray,
    problems: Sequence[str],
    strata_S: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """[<= resamples] AUROCs of resampled problems; those without pairs are left out. With c the times each problem was
    drawn, U = c' W c and pairs = c' N c, where W and N hold the wins and the counts between two problems' responses."""
    order = {p: i for i, p in enumerate(dict.fromkeys(problems))}
    index = np.array([order[p] for p in problems], dtype=np.int64)
    P = len(order)
    counts_BP = _drawn(P, seed, resamples)
    won_B, pairs_B = np.zeros(resamples), np.zeros(resamples)
    for stratum in np.unique(strata_S):
        r, w = (np.flatnonzero((strata_S == stratum) & (right_S == kind)) for kind in (True, False))
        if not len(r) or not len(w):
            continue
        mine, at = np.unique(index[np.concatenate([r, w])], return_inverse=True)  # Q problems of this stratum
        counts_BQ = counts_BP[:, mine]
        right_QR, wrong_WQ = np.zeros((len(mine), len(r))), np.zeros((len(w), len(mine)))
        right_QR[at[: len(r)], np.arange(len(r))] = 1
        wrong_WQ[np.arange(len(w)), at[len(r) :]] = 1
        wins_RW = (scores_S[r][:, None] > scores_S[w]) + 0.5 * (scores_S[r][:, None] == scores_S[w])
        won_B += ((counts_BQ @ (right_QR @ wins_RW @ wrong_WQ)) * counts_BQ).sum(1)
        pairs_B += (counts_BQ @ right_QR.sum(1)) * (counts_BQ @ wrong_WQ.sum(0))
    return won_B[pairs_B > 0] / pairs_B[pairs_B > 0]


@functools.lru_cache(8)
def _drawn(P: int, seed: int, resamples: int) -> np.ndarray:
    """[B, P] how often each problem is drawn; the same for every verifier and author."""
    return np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), size=resamples).astype(np.float64)


def discrimination(
    scores_S: np.ndarray,
    right_S: np.ndarray,
    problems: Sequence[str],
    domains: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """AUROC with a 95% interval that resamples problems, two-fold balanced accuracy, and the counts. Responses of
    several domains are compared, and their thresholds chosen, inside each domain."""
    scores, right = np.asarray(scores_S, np.float64), np.asarray(right_S, bool)
    strata = np.unique(list(domains or ["all"] * len(right)), return_inverse=True)[1]
    threshold = np.full(len(right), np.nan)
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        threshold[inside] = thresholds(scores[inside], right[inside], [problems[int(i)] for i in inside])
    known = ~np.isnan(threshold)
    drawn = auroc_resamples(scores, right, problems, strata, seed=seed, resamples=resamples)
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (float("nan"),) * 2
    known = ~np.isnan(threshold)
    return {
        "auroc": auroc(scores, right, strata),
        "auroc_low": float(low),
        "auroc_high": float(high),
        "balanced_accuracy": balanced_accuracy((scores >= threshold)[known], right[known]),
        "responses": len(right),
        "right": int(right.sum()),
        "problems": len(set(problems)),
    }


# ---- steps and answers -----------------------------------------------------------------------------------------------


def step_ends(text: str) -> list[int]:
    """End positions (characters) of the steps of a response: its non-empty lines, or the words of a single line."""
    pattern = r"[^\n]*\S[^\n]*" if "\n" in text.strip() else r"\S+"
    return [m.end() for m in re.finditer(pattern, text)]


_SUM = re.compile(r"(-?\d+)([+\-*])(\d+)=(-?\d+)")


def first_wrong_sum(text: str) -> int | None:
    """Index of the first step that contains a false integer sum, difference or product; None if there is none."""
    start = 0
    for i, end in enumerate(step_ends(text)):
        for a, op, b, c in _SUM.findall(text[start:end]):
            x, y = int(a), int(b)
            if (x + y if op == "+" else x - y if op == "-" else x * y) != int(c):
                return i
        start = end
    return None


def step_of_token(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[scored tokens] index of the step each written token belongs to: the step its last character falls in; what
    follows the last step (white space, the end token) belongs to the last one. Tokens are the truth: positions are read
    from the decoded tokens, not from encoding the text again."""
    text: Any = tokenizer.decode(sample.tokens, skip_special_tokens=True)
    pieces: list[Any] = [tokenizer.decode([t], skip_special_tokens=True) for t in sample.tokens]
    if "".join(pieces) == text:
        upto = np.cumsum([len(p) for p in pieces])
    else:  # tokenizers whose decoding depends on the neighbours: quadratic, but exact
        upto = np.array(
            [len(tokenizer.decode(sample.tokens[: i + 1], skip_special_tokens=True)) for i in range(len(pieces))]
        )
    ends = step_ends(text)
    if not ends:
        return np.zeros(len(pieces), dtype=np.int64)
    at = np.searchsorted(np.array(ends), np.maximum(upto, 1), side="left")
    at = np.minimum(at, len(ends) - 1)
    written = np.ones(len(pieces), bool) if sample.mask is None else np.asarray(sample.mask, bool)
    return at[written]


def answer_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """(tokens of the final answer, True if it is an answer and not the whole response). The answer is written as the
    response wrote it: boxed if there is a box."""
    text = sample.text.rpartition("</think>")[2]
    answer = final_answer(text)
    if answer is None:
        return list(sample.tokens), False
    written = f"\\boxed{{{answer}}}" if "boxed{" in text else f"Answer: {answer}"
    return tokenizer.encode(written, add_special_tokens=False), True


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scores:
    """One verifier on one author's responses. S responses."""

    problems: list[str]  # [S] prompt ids
    domains: list[str]  # [S]
    right: np.ndarray  # [S] bool
    outcome: np.ndarray  # [S] nats per token, or P(yes)
    process: np.ndarray  # [S, horizon] nats per token of the first h+1 steps
    steps: list[np.ndarray]  # per response: [its steps] mean nats per token of each step
    is_answer: np.ndarray  # [S] bool: outcome was scored on a final answer, not on the whole response

    def take(self, index: Sequence[int]) -> Scores:
        i = list(index)
        return Scores(
            [self.problems[j] for j in i],
            [self.domains[j] for j in i],
            self.right[i],
            self.outcome[i],
            self.process[i],
            [self.steps[j] for j in i],
            self.is_answer[i],
        )


def score(
    verifier: Policy,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    horizon: int = HORIZON,
    outcome: str = "logprob",
    temperature: float = 1.0,
    tokens_per_bin: int = TOKENS_PER_BIN,
) -> Scores:
    """Outcome and process scores of `samples` under `verifier`. outcome: "logprob" or "p_yes"."""
    if not samples:
        raise InputError("verification needs at least one response, got none")
    sequences = [policies.sequence_of(s) for s in samples]
    whole = token_logprobs(verifier, sequences, temperature=temperature, tokens_per_bin=tokens_per_bin)
    process, steps = np.zeros((len(samples), horizon)), []
    for i, (s, logp) in enumerate(zip(samples, whole)):
        at = step_of_token(s, tokenizer)
        count = int(at.max(initial=0)) + 1
        sums, sizes = np.bincount(at, logp, count), np.bincount(at, minlength=count)
        steps.append(np.divide(sums, sizes, out=np.full(count, np.nan), where=sizes > 0))
        for h in range(horizon):
            process[i, h] = sums[: h + 1].sum() / max(sizes[: h + 1].sum(), 1)
    found = [answer_tokens(s, tokenizer) for s in samples]
    if outcome == "p_yes":
        outcome_S = p_yes(verifier, samples, tokenizer, tokens_per_bin=tokens_per_bin)
    else:
        answers = [
            ([*s.prompt.tokens, *tokens], [False] * len(s.prompt.tokens) + [True] * len(tokens))
            for s, (tokens, _) in zip(samples, found)
        ]
        scored = token_logprobs(verifier, answers, temperature=temperature, tokens_per_bin=tokens_per_bin)
        outcome_S = np.array([v.mean() if len(v) else np.nan for v in scored])
    return Scores(
        [s.prompt.id for s in samples],
        [s.prompt.domain for s in samples],
        np.array([s.reward > 0.5 for s in samples]),
        outcome_S,
        process,
        steps,
        np.array([is_answer for _, is_answer in found]),
    )


@torch.no_grad()
def p_yes(
    verifier: Policy,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens_per_bin: int = TOKENS_PER_BIN,
) -> np.ndarray:
    """[S] P(yes) / (P(yes) + P(no)) as the next token after QUESTION, in the model's chat template where it has one."""
    ids = {word: [tokenizer.encode(word, add_special_tokens=False)[0]] for word in ("yes", "no")}
    if ids["yes"] == ids["no"]:
        raise InputError('P(yes) needs a tokenizer that tells "yes" from "no" by the first token; this one does not')
    prompts = []
    for s in samples:
        answer = final_answer(s.text.rpartition("</think>")[2]) or s.text
        text = QUESTION.format(problem=s.prompt.text, answer=answer)
        if tokenizer.chat_template:
            prompts.append(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        else:
            prompts.append(tokenizer.encode(text))
    logp = {
        word: np.concatenate(
            token_logprobs(
                verifier, [([*p, *token], [False] * len(p) + [True]) for p in prompts], tokens_per_bin=tokens_per_bin
            )
        )
        for word, token in ids.items()
    }
    return 1 / (1 + np.exp(logp["no"] - logp["yes"]))


# ---- the locus of the first error ------------------------------------------------------------------------------------


def locus(
    scores: Scores, texts: Sequence[str], *, oracle: Callable[[str], int | None] = first_wrong_sum
) -> dict[str, Any]:
    """Where the first error is seen: of the wrong responses that are called wrong, the histogram of the position (step
    index over the number of steps, in fifths); where `oracle` knows the first wrong step, how often it is hit."""
    worst = np.array([np.nanmin(s) for s in scores.steps])
    threshold = thresholds(worst, scores.right, scores.problems)
    called_right = worst >= threshold
    positions, hits, near, chance = [], 0, 0, 0.0
    truths = 0
    for i, steps in enumerate(scores.steps):
        if scores.right[i] or np.isnan(threshold[i]):
            continue
        below = np.flatnonzero(steps < threshold[i])
        if len(below):
            positions.append(float(below[0] / max(len(steps) - 1, 1)))
        truth = oracle(texts[i])
        if truth is not None and truth < len(steps):
            truths += 1
            chance += 1 / len(steps)
            hits += len(below) > 0 and int(below[0]) == truth
            near += len(below) > 0 and abs(int(below[0]) - truth) <= 1
    known = ~np.isnan(threshold)
    return {
        "balanced_accuracy": balanced_accuracy(called_right[known], scores.right[known]),
        "wrong_called_wrong": len(positions),
        "histogram": np.histogram(positions, bins=5, range=(0, 1))[0].tolist(),
        "mean_position": float(np.mean(positions)) if positions else float("nan"),
        "known_first_errors": truths,
        "exact": hits / truths if truths else float("nan"),
        "within_one_step": near / truths if truths else float("nan"),
        "chance": chance / truths if truths else float("nan"),
    }


# ---- the analysis ----------------------------------------------------------------------------------------------------


def verify(
    verifiers: Mapping[str, Source],
    samples: Mapping[str, Sequence[Sample]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    horizon: int = HORIZON,
    outcome: str = "logprob",
    tokens_per_bin: int = TOKENS_PER_BIN,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[str, str], Scores]:
    """(verifier, author) -> scores; every verifier is loaded once. samples: by author."""
    library = Library(verifiers, 2, device, dtype)
    return {
        (v, a): score(library[v], mine, tokenizer, horizon=horizon, outcome=outcome, tokens_per_bin=tokens_per_bin)
        for v in verifiers
        for a, mine in samples.items()
    }


def trajectory(points: Mapping[int, Scores], *, seed: int = 0, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """Self-discrimination during training: step -> the scores that the policy of that step gave its own responses."""
    rows = []
    for step, scores in sorted(points.items()):
        for kind, values in (("outcome", scores.outcome), ("process", scores.process[:, -1])):
            rows.append(
                {
                    "step": step,
                    "kind": kind,
                    **discrimination(
                        values, scores.right, scores.problems, scores.domains, seed=seed, resamples=resamples
                    ),
                }
            )
    return rows


def analyze(
    scores: Mapping[tuple[str, str], Scores],
    texts: Mapping[str, Sequence[str]],
    *,
    outcome: str = "logprob",
    training: Mapping[int, Scores] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Analysis:
    """scores: (verifier, author) -> Scores; texts: author -> response texts in the same order; training: as in
    `trajectory`. InputError if there is nothing to discriminate anywhere."""
    if not scores:
        raise InputError("verification needs at least one verifier and one author, got none")
    if all(s.right.all() or not s.right.any() for s in scores.values()):
        raise InputError("every response is right, or every one is wrong: there is nothing to tell apart")
    rows: list[dict[str, Any]] = []
    loci: list[dict[str, Any]] = []
    for (v, a), s in scores.items():
        groups: dict[str, list[int]] = {"all": list(range(len(s.right)))}
        for i, d in enumerate(s.domains):
            groups.setdefault(d, []).append(i)
        for domain, index in groups.items():
            part = s.take(index)
            values = {"outcome": part.outcome} | {
                f"process@{h + 1}": part.process[:, h] for h in range(part.process.shape[1])
            }
            for kind, of_kind in values.items():
                rows.append(
                    {
                        "verifier": v,
                        "author": a,
                        "self": v == a,
                        "domain": domain,
                        "score": kind,
                        **discrimination(
                            of_kind, part.right, part.problems, part.domains, seed=seed, resamples=resamples
                        ),
                        "answers": float(part.is_answer.mean()) if kind == "outcome" else None,
                    }
                )
            if domain != "all":  # a threshold is of one domain
                loci.append({"verifier": v, "author": a, "domain": domain, **locus(part, [texts[a][i] for i in index])})
    verifiers, authors = (list(dict.fromkeys(pair[k] for pair in scores)) for k in (0, 1))
    horizon = next(iter(scores.values())).process.shape[1]

    def value(v: str, a: str, kind: str, domain: str = "all") -> float:
        return next(
            (
                float(r["auroc"])
                for r in rows
                if (r["verifier"], r["author"], r["score"], r["domain"]) == (v, a, kind, domain)
            ),
            float("nan"),
        )

    drawn = [
        figures.heat_map(
            kind,
            f"AUROC of the row judging the column's responses ({title})",
            [[value(v, a, key) for a in authors] for v in verifiers],
            verifiers,
            authors,
        )
        for kind, key, title in (
            ("outcome", "outcome", "final answer only"),
            ("process", f"process@{horizon}", f"first {horizon} steps"),
        )
    ]
    own = [v for v in verifiers if (v, v) in scores]
    drawn.append(
        figures.chart(
            "horizon",
            "lines",
            "Self-verification by horizon",
            [
                figures.Series(
                    v, [float(h + 1) for h in range(horizon)], [value(v, v, f"process@{h + 1}") for h in range(horizon)]
                )
                for v in own
            ],
            x_title="steps seen",
            y_title="AUROC",
        )
    )
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        "discrimination": rows,
        "locus": [{**r, "histogram": " ".join(map(str, r["histogram"]))} for r in loci],
    }
    if training:
        points = trajectory(training, seed=seed, resamples=resamples)
        tables["training"] = points
        drawn.append(
            figures.chart(
                "training",
                "lines",
                "Self-discrimination during training",
                [
                    figures.Series(
                        k,
                        [float(r["step"]) for r in points if r["kind"] == k],
                        [r["auroc"] for r in points if r["kind"] == k],
                        [r["auroc_low"] for r in points if r["kind"] == k],
                        [r["auroc_high"] for r in points if r["kind"] == k],
                    )
                    for k in ("outcome", "process")
                ],
                x_title="optimizer step",
                y_title="AUROC",
            )
        )
    return Analysis(
        "verification",
        {
            "outcome": "P(yes) / (P(yes) + P(no)) after a question showing problem and answer"
            if outcome == "p_yes"
            else "mean log-probability per token (nats) of the final answer given the problem, without the working; "
            "`answers` is the share of responses that have a final answer, the rest are scored whole",
            "process@h": "mean log-probability per token (nats) of the first h steps; a step is a non-empty line, or "
            "a word where the response has one line",
            "auroc": "probability that a right response scores above a wrong one, ties one half; pairs of one "
            "domain only; 95% interval over problems",
            "balanced_accuracy": "(TPR + TNR) / 2, threshold chosen on the other half of the problems",
            "locus": "first step below the threshold that parts right from wrong responses by their worst step; "
            "`exact` compares with the first false integer sum where the steps are sums, `chance` is a random step",
            "self": "verifier and author are the same model",
        },
        f"Idea: {PAPER}, section on locus of error and verification horizon (no formulas given). Definitions: ours; "
        "AUROC after Hanley & McNeil 1982.",
        {
            "verifiers": verifiers,
            "authors": authors,
            "horizon": horizon,
            "outcome_score": outcome,
            "seed": seed,
            "bootstrap_resamples": resamples,
        },
        {
            "auroc_outcome": [[value(v, a, "outcome") for a in authors] for v in verifiers],
            "auroc_process": [[value(v, a, f"process@{horizon}") for a in authors] for v in verifiers],
            "locus": loci,
        },
        tables,
        drawn,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    policies.add_arguments(parser)
    parser.add_argument("--horizon", type=int, default=HORIZON, help="steps")
    parser.add_argument("--outcome", choices=("logprob", "p_yes"), default="logprob")
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="STEP=FOLDER",
        help="models saved during training: their self-discrimination by step",
    )


def run(args: argparse.Namespace) -> Analysis:
    saved = {}
    for step, folder in named(args.training, "--training").items():
        if not step.isdigit():
            raise InputError(f"--training takes STEP=FOLDER with a whole number of steps, got {step!r}")
        saved[f"step-{int(step):06d}"] = folder
    if saved:
        check_models({**named(args.models, "--models"), **saved})
    models, experts, samples = policies.gather(args)
    tokenizer = AutoTokenizer.from_pretrained(models[args.base])
    options: dict[str, Any] = {
        "horizon": args.horizon,
        "outcome": args.outcome,
        "tokens_per_bin": args.tokens_per_bin,
        "dtype": getattr(torch, args.dtype),
    }
    scores = verify(models, samples, tokenizer, **options)
    training = {}
    if saved:
        own = policies.sample(args, saved, list(experts))
        for name, folder in saved.items():
            training[int(name[5:])] = verify({name: folder}, {name: own[name]}, tokenizer, **options)[name, name]
    return analyze(
        scores,
        {a: [s.text for s in mine] for a, mine in samples.items()},
        outcome=args.outcome,
        training=training,
        seed=args.seed,
    )
