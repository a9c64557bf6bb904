"""Made-up rows in the schemas of the blends and of their sources; the shapes are real, the contents are not."""

RL_KEYS = (
    "id",
    "responses_create_params",
    "agent_ref",
    "dataset",
    "pass_rate",
    "expected_answer",
    "uuid",
    "options",
    "template_metadata",
    "instruction_id_list",
    "prompt",
    "kwargs",
    "verifier_metadata",
    "hash_id",
    "ground_truth",
    "category",
    "environment_name",
    "_hf_placeholder",
)
DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'


def rl(dataset: str, text: str = "", agent: str = "x_simple_agent", tools=None, **fields) -> dict:
    """One row; keys that its sub-corpus does not use are null, as in the union of all."""
    message = [{"role": "user", "content": text}] if text else []
    parameters = {"input": message, **({"tools": tools} if tools else {})}
    return {
        **dict.fromkeys(RL_KEYS),
        "responses_create_params": parameters,
        "dataset": f"nano_v3_sft_profiled_{dataset}",
        "agent_ref": {"type": "responses_api_agents", "name": agent},
        "pass_rate": 0.5,
        **fields,
    }


def dapo_source(n: int) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{DAPO_HEAD}What is {i} + {i}?{DAPO_TAIL}"}],
            "reward_model": {"ground_truth": str(2 * i), "style": "rule"},
            "extra": i,
        }
        for i in range(n)
    ]


def skywork_source(n: int) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Find {i} squared."}],
            "reward_model": {"ground_truth": f'["{i * i}", "other"]' if i else "[]"},
        }
        for i in range(n)
    ]


def dapo_row(row: int) -> dict:
    return rl(
        "dapo17k", _hf_placeholder={"row": row, "question_template": {"prefix": "", "suffix": "\n\nBox the answer."}}
    )


def skywork_row(row: int) -> dict:
    return rl(
        "skywork_no_omni",
        _hf_placeholder={"row": row, "question_template": {"template": "Think, then box.\n\n{question}"}},
    )


def code_row(i: int = 0) -> dict:
    return rl(
        "comp_coding_50tests",
        f"Read n. Print n times {i}.",
        hash_id=f"c{i}",
        verifier_metadata={
            "problem_id": None,
            "unit_tests": {"inputs": ["1\n", "2\n"], "outputs": [f"{i}\n", f"{2 * i}\n"]},
        },
    )


def science_row(i: int = 0, letter: str = "B") -> dict:
    options = [
        {"A": "helium", "B": None, "C": None},
        {"A": None, "B": f"neon {i}", "C": None},
        {"A": None, "B": None, "C": "argon"},
    ]
    return rl(
        "stem_mcqa",
        f"Answer the following multiple choice question. Which gas fills lamp {i}?",
        uuid=f"s{i}",
        options=options,
        expected_answer=letter,
        template_metadata={"output_regex": r"Answer:\s*([A-C])"},
    )


def if_row(i: int = 0) -> dict:
    return rl(
        "instruction_following",
        f"Tell tale {i} without commas.",
        id=i,
        prompt=f"Tell tale {i} without commas.",
        instruction_id_list=["punctuation:no_comma", "length_constraints:number_words"],
        kwargs=[None, {"num_words": 9, "relation": "at least", "keyword": None}],
    )


def agent_row(i: int = 0) -> dict:
    tools = [{"type": "function", "name": "email_send_email", "parameters": {"type": "object", "properties": {}}}]
    return rl(
        "workbench",
        f"Send mail {i}.",
        tools=tools,
        id=i,
        category="email",
        ground_truth=[{"name": "email_send_email", "arguments": '{"recipient": "a@example.com"}'}],
    )


def dropped_row() -> dict:
    return rl("structured_outputs", "Give JSON.", schema_str="{}", schema_type="json")


def sft_row(user: str = "Say hi.", **fields) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "", "reasoning_content": None, "tool_calls": None},
            {"role": "user", "content": user, "reasoning_content": None, "tool_calls": None},
            {
                "role": "assistant",
                "content": "hi",
                "reasoning_content": "short",
                "tool_calls": '[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]',
            },
        ],
        "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
        **fields,
    }
