"""What a sweep that can be planned must have to be trained, told before workers load anything."""

from orchestration.choice_config import asks_answers, task_spec
from orchestration.config import SweepConfig
from orchestration.planning import Plan
from orchestration.rl_config import rl_spec
from trainers.base_spec import NOT_QUANTIZED


def require_supported(config: SweepConfig) -> None:
    """Raises:
    ValueError: what no plan is needed to find out; also by a file of rewards that cannot be used.
    """
    if config.data is None:
        raise ValueError("a sweep needs data; dataset_tokens alone is enough for plan only")
    if (spec := rl_spec(config) or task_spec(config)) is not None:
        from trainers.rewards import Reward  # runs the user's own file

        Reward(spec.reward)


def require_trainable(plan: Plan) -> None:
    """Raises:
    ValueError: what the plan's workers would find out when they had loaded everything.
    """
    _require_quantizable(plan)
    _require_vocabulary(plan)
    _require_prompts(plan)


def _require_prompts(plan: Plan) -> None:
    """Raises:
    ValueError: the data of a sweep with rewards or a metric of answers are texts, of which nothing is a prompt.
    """
    assert plan.audit is not None
    texts = [shape for shape in plan.audit.shapes if shape.startswith("text")]
    who = "method: rl" if plan.config.method == "rl" else "metric: an answer"
    if texts and (plan.config.method == "rl" or asks_answers(plan.config)):
        raise ValueError(
            f"{who} needs rows of a prompt and an answer (columns: {{prompt: question, completion: answer}}), the "
            f"data has {texts[0]} rows"
        )


def _require_vocabulary(plan: Plan) -> None:
    """A token without a row of the embedding is an index error on a CPU and a dead worker on a GPU.

    Raises:
        ValueError: the tokenizer has such tokens: new ones, which this version does not train.
    """
    from trainers.data.tokenizer import load_tokenizer

    assert plan.data_spec is not None
    vocabulary = load_tokenizer(plan.data_spec.model).encoder.get_vocab(with_added_tokens=True)
    rows = plan.shape.vocab_size
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise ValueError(
            f"model {plan.config.model}: every token must have a row of the embedding, which has {rows:,}; the "
            f"tokenizer has {len(beyond)} beyond, first {token!r} ({number}); new tokens are not trained by this "
            "version: resize and train the embedding first, or take them out of tokenizer.json"
        )


def _require_quantizable(plan: Plan) -> None:
    """Told before workers load a base for nothing.

    Raises:
        ValueError: 4-bit loading reaches no layer of such a model.
    """
    if plan.config.quantization == "nf4" and plan.shape.model_type in NOT_QUANTIZED:
        raise ValueError(
            f"quantization: nf4 reaches no layer of a {plan.shape.model_type} model, whose Linear layers are of "
            "a class of their own; set quantization: none"
        )
