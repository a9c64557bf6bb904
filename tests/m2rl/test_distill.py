"""Distillation: the gradients against autograd of the exact divergence, and the command with one teacher per domain."""

import json

import numpy as np
import pytest
import tiny
import torch
from commands import torchrun

from m2rl import checkpoint
from m2rl.config import Config, Objective, Optim, build, read_toml
from m2rl.learner import Learner
from m2rl.objectives import PolicyGradient, TeacherDivergence
from m2rl.policy import ATTENTION, Policy, load_weights
from m2rl.train import main
from m2rl.types import InputError


def learner(tokens_per_bin=1000):
    return Learner(Policy(tiny.model(attention=ATTENTION)), Optim(lr=1e-3), 10, tokens_per_bin, ["a", "b"])


def teacher():
    return Policy(tiny.model(attention=ATTENTION, seed=7)).requires_grad_(False)


def exact(rows, direction):
    """(divergence summed by weight, gradient) in float64, one sequence at a time, from the whole distributions."""
    student, target = tiny.model().double(), tiny.model(seed=7).double()
    total = torch.zeros((), dtype=torch.float64)
    for r in rows:
        at = torch.from_numpy(np.flatnonzero(r.trained)) - 1
        p = student(input_ids=torch.tensor([r.tokens])).logits[0, at].log_softmax(-1)
        q = target(input_ids=torch.tensor([r.tokens])).logits[0, at].log_softmax(-1).detach()
        kl = (p.exp() * (p - q)).sum(-1) if direction == "reverse" else (q.exp() * (q - p)).sum(-1)
        total = total + r.weight * kl.sum()
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("tokens_per_bin", [1000, 40])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_full_vocabulary_gradient_is_that_of_the_exact_divergence(direction, tokens_per_bin):
    rows = tiny.rows()
    made = learner(tokens_per_bin)
    totals = made.backward(rows, TeacherDivergence(teacher(), direction))
    value, gradient = exact(rows, direction)
    got = torch.cat([p.grad.flatten() for p in made.policy.parameters()]).double()
    assert float(totals[0]) == pytest.approx(value, rel=1e-4)
    assert (got - gradient).norm() / gradient.norm() < 1e-5


def test_sampled_reverse_kl_has_the_divergences_gradient_in_expectation():
    """One trained position whose token is enumerated: the expectation over it is exact, not sampled."""
    tokens = tiny.sequences((9,))[0]
    row = tiny.rows((9,))[0]
    row.trained = np.arange(9) == 8
    row.tokens, row.weight = tokens, 1.0
    _, want = exact([row], "reverse")
    made, target = learner(), teacher()
    p = tiny.model()(input_ids=torch.tensor([tokens])).logits[0, 7].softmax(-1).detach()
    total = torch.zeros_like(want)
    for token in range(tiny.VOCAB):
        row.tokens = [*tokens[:8], token]
        row.behaviour_logp = np.log(p[token : token + 1].numpy())
        row.advantage = made.score([row], target)[0] - row.behaviour_logp
        made.backward([row], PolicyGradient(Objective(loss="reinforce", tis_cap=0.0)))
        total += float(p[token]) * torch.cat([q.grad.flatten() for q in made.policy.parameters()]).double()
        made.optimizer.zero_grad(set_to_none=True)
    assert (total - want).norm() / want.norm() < 1e-4


def test_teachers_are_written_in_place_and_another_architecture_is_refused(tmp_path):
    tiny.model(seed=7).save_pretrained(tmp_path / "same")
    tiny.model(tied=False, seed=7).save_pretrained(tmp_path / "untied")
    tiny.model(vocab=50, seed=7).save_pretrained(tmp_path / "vocabulary")
    policy = Policy(tiny.model(attention=ATTENTION))
    addresses = [p.data_ptr() for p in policy.parameters()]
    load_weights(policy, tmp_path / "same")
    assert [p.data_ptr() for p in policy.parameters()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), tiny.model(seed=7).parameters()))
    for other in ("untied", "vocabulary"):
        with pytest.raises(InputError, match="another architecture"):
            load_weights(policy, tmp_path / other)


def test_the_shipped_full_size_recipe_is_the_papers():
    c, mixed = (build(Config, *read_toml(name)) for name in ("qwen3_4b_distill", "qwen3_4b_mixed"))
    r, o = c.rollout, c.optim
    assert (r.prompts_per_step, r.group_size, r.max_new_tokens, r.max_prompt_tokens) == (256, 4, 16384, 2048)
    assert (o.lr, o.weight_decay, o.beta1, o.beta2, o.schedule) == (1e-6, 0.1, 0.9, 0.98, "constant")
    assert (c.distill.divergence, c.objective.tis_cap, c.objective.kl_coef) == ("sampled_reverse", 0.0, 0.0)
    assert c.train.steps == 200 and c.data.train == mixed.data.train and c.model == mixed.model
    assert len({d.teacher for d in c.domain}) == 4


def test_token_mass_is_shared_as_asked_and_the_total_stays():
    from m2rl.distill import share_mass, token_mass

    rows = tiny.rows(domains=3)
    before = token_mass(rows, 3)
    share_mass(rows, [0.0, 0.0, 0.0])
    assert token_mass(rows, 3) == pytest.approx(before)
    share_mass(rows, [1.0, 2.0, 5.0])
    assert token_mass(rows, 3) / before.sum() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    rows = [r for r in rows if r.domain != 2]
    share_mass(rows, [1.0, 3.0, 9.0])
    mass = token_mass(rows, 3)
    assert mass / mass.sum() == pytest.approx([1 / 4, 3 / 4, 0])


def test_teachers_of_another_tokenizer_or_architecture_or_nowhere_are_refused_before_weights_are_read(tmp_path):
    from m2rl import embedded
    from m2rl.distill import check_teachers

    for name in ("student", "teacher", "words"):
        embedded.save(tmp_path / name, 0)
    for name in ("student", "teacher", "words"):
        (tmp_path / name / "model.safetensors").write_bytes(b"not read")
    tiny.model().save_pretrained(tmp_path / "other")
    embedded.build_tokenizer().save_pretrained(tmp_path / "other")
    check_teachers(str(tmp_path / "student"), {"math": str(tmp_path / "teacher")})
    words = tmp_path / "words" / "tokenizer.json"
    words.write_text(words.read_text().replace('"sum("', '"som("'))
    for name, message in (
        ("words", "domain if: teacher .*words has another tokenizer than the student: 2 entries differ, first 's.m"),
        ("other", "domain if: teacher .*other is of another architecture than the student: vocab_size is 97"),
        ("nowhere", "domain if: teacher .*nowhere is not a Hugging Face model folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_teachers(str(tmp_path / "student"), {"math": str(tmp_path / "teacher"), "if": str(tmp_path / name)})


def user_toml(folder, divergence, **teachers):
    lines = ['name = "distilled"', 'algorithm = "distill"', f'run_dir = "{folder / "run"}"']
    lines += ["[model]", f'path = "{folder / "model"}"', "[data]", 'eval = ["procedural"]']
    lines += [f'[[domain]]\nname = "{d}"\nquota = 2\nteacher = "{t}"' for d, t in teachers.items()]
    lines += ["[rollout]", "prompts_per_step = 4", "group_size = 32", "max_prompt_tokens = 40", "max_new_tokens = 24"]
    lines += ["[objective]", 'aggregation = "domain"', "[optim]", "lr = 1e-3", "[train]", "steps = 6"]
    lines += ["tokens_per_bin = 4000", "[evaluation]", "k = 2", "problems = 4", "[distill]"]
    (folder / "my.toml").write_text("\n".join([*lines, f'divergence = "{divergence}"']))
    return str(folder / "my.toml")


@pytest.fixture
def folders(tmp_path):
    from m2rl import embedded

    for seed, name in enumerate(("model", "math_teacher", "if_teacher")):
        embedded.save(tmp_path / name, seed)
    return tmp_path


@pytest.mark.parametrize(("divergence", "ranks"), [("sampled_reverse", 1), ("forward", 2)])
def test_the_command_distills_each_domains_teacher(folders, divergence, ranks):
    config = user_toml(folders, divergence, math=folders / "math_teacher", **{"if": folders / "if_teacher"})
    done = torchrun("-m", "m2rl.train", "--config", config, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folders / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in lines if "loss" in m]
    assert len(steps) == 6
    name = "reverse_kl" if divergence == "sampled_reverse" else f"{divergence}_kl"
    assert all(m[f"{d}/token_mass"] == pytest.approx(0.5) for m in steps for d in ("math", "if"))
    assert steps[-1][f"math/{name}"] < steps[0][f"math/{name}"]
    assert checkpoint.complete(folders / "run")


def test_the_engine_is_awake_with_the_newest_weights_whenever_it_generates(folders, monkeypatch):
    """On a GPU an engine sleeps while the learner works; a rollout on a sleeping one fails."""
    from m2rl.rollout.native import NativeEngine

    awake, versions = [True], []
    submit, sync = NativeEngine.submit, NativeEngine.sync

    def watched(self, requests):
        assert awake[0], "rollout on a sleeping engine"
        return submit(self, requests)

    def synced(self, policy, version):
        versions.append(version)
        return sync(self, policy, version)

    monkeypatch.setattr(NativeEngine, "sleep", lambda self: awake.__setitem__(0, False))
    monkeypatch.setattr(NativeEngine, "wake", lambda self: awake.__setitem__(0, True))
    monkeypatch.setattr(NativeEngine, "submit", watched)
    monkeypatch.setattr(NativeEngine, "sync", synced)
    config = user_toml(folders, "sampled_reverse", math=folders / "math_teacher", **{"if": folders / "if_teacher"})
    assert main(["--config", config, "--train.steps", "2"]) == 0
    assert versions[-3:] == [0, 1, 2] and not awake[0]  # two steps, and the evaluation after them


def test_a_domain_without_a_teacher_is_an_error(folders):
    with pytest.raises(InputError, match="domain math: distillation needs its teacher"):
        main(["--config", user_toml(folders, "reverse", math="")])


@pytest.mark.parametrize(
    "option", ["--objective.kl-coef 0.1", "--rollout.dynamic-sampling-rounds 1", "--rollout.carry-over 0.1"]
)
def test_an_option_that_distillation_does_not_read_is_an_error(folders, option):
    config = user_toml(folders, "reverse", math=folders / "math_teacher", **{"if": folders / "if_teacher"})
    with pytest.raises(InputError, match="distillation does not read"):
        main(["--config", config, *option.split()])
