"""What there is to know of each tuner of peft that its own config class does not say. Nothing here imports peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One tuner, or one start of LoRA."""

    type: str
    """Of peft: a `PeftType`."""

    source: str
    """Authors (year), title, number of the paper, equation or section."""

    rank: tuple[str, int] | None = None
    """The key of its config that the setting `rank` goes to, and the default of that."""

    rate: float = 2e-4
    """Default learning rate. Tuners of few numbers take larger ones."""

    family: str = "linear"
    """Which class of settings it has: a key of `FAMILIES` in `pare.methods.finetune.tuners`."""

    seed: str | None = None
    """The key of its config that `init_seed` goes to, for draws that it repeats when it is loaded."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What makes it this tuner and no other, in its config."""

    usual: Mapping[str, Any] = field(default_factory=dict)
    """Values of its config where peft has none or one that does not fit common widths."""

    takes_from_base: bool = False
    """Whether its start takes its own product from the weights: W - s B0 A0."""

    is_no_op: bool = True
    """Whether the model is unchanged before the first step."""

    bound: int = 0
    """If not 0, its update has at most rank ** bound as its own rank, so that it is kept as factors."""

    divides: tuple[str, str] | None = None
    """(key of its config, "in", "out" or "both"): the widths of a linear of which that has to be a divisor."""

    shards: str = "data"
    """See `TrainMethod.shards`."""


LORA = ("r", 8)

KINDS: dict[str, Kind] = {
    # LoRA in other scales, forms and starts
    "rslora": Kind("LORA", "Kalajdzievski (2023), rsLoRA, arXiv:2312.03732, theorem 3.2",
        LORA, family="lora", fixed={"use_rslora": True}, shards="zero3"),
    "dora": Kind("LORA", "Liu et al. (2024), DoRA, arXiv:2402.09353, eq. 5", LORA, family="lora", fixed={"use_dora": True}),
    "pissa": Kind("LORA", "Meng et al. (2024), PiSSA, arXiv:2404.02948, eqs. 2 to 4",
        LORA, family="lora", usual={"init_lora_weights": "pissa"}, takes_from_base=True, shards="zero3"),
    "olora": Kind("LORA", "Büyükakyüz (2024), OLoRA, arXiv:2406.01775, algorithm 1",
        LORA, family="lora", fixed={"init_lora_weights": "olora"}, takes_from_base=True, shards="zero3"),
    "orthogonal": Kind("LORA", "Datta (2024), Rethinking LoRA initialisations, `orthogonal` of peft 0.21",
        LORA, family="lora", fixed={"init_lora_weights": "orthogonal"}, shards="zero3"),
    "mica": Kind("LORA", "MiCA (2026), Minor Component Adaptation, arXiv:2604.01694",
        LORA, family="lora", fixed={"init_lora_weights": "mica"}),
    "eva": Kind("LORA", "Paischer et al. (2024), EVA, arXiv:2410.07170, section 3",
        LORA, family="lora_from_data", fixed={"init_lora_weights": "eva"}, shards="zero3"),
    "corda": Kind("LORA", "Yang et al. (2024), CorDA, arXiv:2406.05223, eqs. 2 to 6",
        LORA, family="lora_from_data", fixed={"init_lora_weights": "corda"}, takes_from_base=True, shards="zero3"),
    "lora_ga": Kind("LORA", "Wang et al. (2024), LoRA-GA, arXiv:2407.05000, algorithm 1",
        LORA, family="lora_from_data", fixed={"init_lora_weights": "lora_ga"}, takes_from_base=True, shards="zero3"),
    "adalora": Kind("ADALORA", "Zhang et al. (2023), AdaLoRA, arXiv:2303.10512, algorithm 1",
        ("target_r", 8), family="adalora"),
    # other low-rank updates
    "vera": Kind("VERA", "Kopiczko et al. (2023), VeRA, arXiv:2310.11454, eq. 2",
        ("r", 256), 2e-3, "ranked", "projection_prng_key", bound=1),
    "pvera": Kind("PVERA", "PVeRA (2025), arXiv:2512.07703", ("r", 256), 2e-3, "ranked", "projection_prng_key", bound=1),
    "loha": Kind("LOHA", "Hyeon-Woo et al. (2021), FedPara, arXiv:2108.06098, section 2.2", ("r", 8), 2e-4, "ranked", bound=2),
    "lokr": Kind("LOKR", "Yeh et al. (2023), LyCORIS, arXiv:2309.14859, section 3.2", ("r", 8), 2e-4, "ranked"),
    "delora": Kind("DELORA", "Bini et al. (2025), DeLoRA, arXiv:2503.18225", ("r", 8), 1e-3, "ranked", bound=1),
    "miss": Kind("MISS", "Kang and Yin (2024), MiSS, arXiv:2409.15371", ("r", 64), 2e-4, "ranked", bound=1),
    "deft": Kind("DEFT", "DEFT, as in peft 0.21: W' = (I - P p(P)) W + P R", ("r", 8), 2e-4, "ranked", bound=1),
    "hira": Kind("HIRA", "Huang et al. (2025), HiRA, ICLR 2025 (openreview TwJrTz9cRS), eq. 3", ("r", 32), 2e-4, "ranked"),
    "gralora": Kind("GRALORA", "Jung et al. (2025), GraLoRA, arXiv:2505.20355",
        ("r", 32), 2e-4, "ranked", divides=("gralora_k", "both"), usual={"gralora_k": 2}),
    "glora": Kind("GLORA", "Chavan et al. (2023), GLoRA, arXiv:2306.07967, eq. 10", ("r", 8), 2e-4, "ranked"),
    "randlora": Kind("RANDLORA", "Albert et al. (2025), RandLoRA, arXiv:2502.00987, eq. 3",
        ("r", 32), 2e-4, "ranked", "projection_prng_key"),
    "tinylora": Kind("TINYLORA", "TinyLoRA (2026), arXiv:2602.04118", ("r", 2), 2e-3, "ranked", "projection_seed", bound=1),
    "unilora": Kind("UNILORA", "Uni-LoRA (2025), arXiv:2506.00799",
        ("r", 4), 2e-3, "ranked", "proj_seed", bound=1, is_no_op=False),
    "vblora": Kind("VBLORA", "Li et al. (2024), VB-LoRA, arXiv:2405.15179",
        ("r", 4), 2e-3, "ranked", bound=1, usual={"vector_length": 64}, is_no_op=False, divides=("vector_length", "both")),
    "adamss": Kind("ADAMSS", "AdaMSS, as in peft 0.21: low-rank updates in clustered subspaces of an SVD",
        ("r", 100), 2e-3, "ranked", "random_seed", fixed={"use_asa": False}),
    # rotations and factors
    "oft": Kind("OFT", "Qiu et al. (2023), OFT, arXiv:2306.07280, eq. 3",
        usual={"oft_block_size": 32}, divides=("oft_block_size", "in")),
    "boft": Kind("BOFT", "Liu et al. (2023), BOFT, arXiv:2311.06243, eq. 5",
        usual={"boft_block_size": 4}, divides=("boft_block_size", "in")),
    "hra": Kind("HRA", "Yuan et al. (2024), HRA, arXiv:2405.17484, eq. 3", ("r", 8), 2e-4, "ranked", bound=1),
    "road": Kind("ROAD", "Liao and Monz (2024), RoAd, arXiv:2409.00119, eq. 3",
        rate=2e-3, usual={"group_size": 64}, divides=("group_size", "out")),
    "psoft": Kind("PSOFT", "PSOFT (2026), openreview FSHrinMArK", ("r", 32), 2e-3, "ranked", "random_seed"),
    "ia3": Kind("IA3", "Liu et al. (2022), (IA)^3, arXiv:2205.05638, section 3.3", rate=2e-3),
    # sparse, in another basis, or of the weights' own directions
    "shira": Kind("SHIRA", "Bhardwaj et al. (2024), SHiRA, arXiv:2406.13175", ("r", 32), 2e-4, "ranked", "random_seed"),
    "supertuning": Kind("SUPERTUNING", "Super-Tuning (2026), arXiv:2607.09287"),
    "fourierft": Kind("FOURIERFT", "Gao et al. (2024), FourierFT, arXiv:2405.03003, eqs. 2 to 4",
        rate=2e-3, seed="random_loc_seed", is_no_op=False),
    "waveft": Kind("WAVEFT", "Bilican et al. (2025), WaveFT, arXiv:2505.12532", rate=2e-3, seed="random_loc_seed"),
    "c3a": Kind("C3A", "Chen et al. (2024), C3A, arXiv:2407.19342, eq. 5",
        rate=2e-3, usual={"block_size": 64}, is_no_op=False, divides=("block_size", "both")),
    "frod": Kind("FROD", "FRoD (2026), AAAI 40, doi:10.1609/aaai.v40i31.39813",
        rate=2e-3, seed="projection_prng_key", fixed={"progressbar": False}),
    "osf": Kind("OSF", "Nayak et al. (2025), Sculpting Subspaces, arXiv:2504.07097, section 3"),
    "peanut": Kind("PEANUT", "PEANuT (2024), arXiv:2410.01870", ("r", 32), 2e-4, "ranked"),
    # norms
    "ln_tuning": Kind("LN_TUNING", "Zhao et al. (2023), Tuning LayerNorm, arXiv:2312.11420, section 3",
        rate=2e-3, family="norms"),
}  # fmt: skip
"""Name of the method -> what it is. `lora` and `qlora` are methods of their own files."""

PROMPTS: dict[str, Kind] = {
    "prompt_tuning": Kind("PROMPT_TUNING", "Lester et al. (2021), Prompt tuning, arXiv:2104.08691, section 2",
        rate=1e-2, is_no_op=False),
    "p_tuning": Kind("P_TUNING", "Liu et al. (2021), GPT Understands, Too, arXiv:2103.10385v1, section 3.2",
        rate=1e-3, is_no_op=False),
    "prefix_tuning": Kind("PREFIX_TUNING", "Li and Liang (2021), Prefix-Tuning, arXiv:2101.00190, section 4, eq. 3",
        rate=1e-2, is_no_op=False),
}  # fmt: skip
"""The same, of those that train what stands before the input (`pare.methods.finetune.prompts`)."""

NOT_OFFERED: dict[str, str] = {
    "cpt": "it wants token numbers, a type for each of them, and with every row the types of its tokens",
    "cartridge": "it is prefix_tuning that starts from a text, the first tokens frozen. Try: method@recipe.tune=prefix_tuning "
    "recipe.tune.init=text recipe.tune.init_text=TEXT",
    "adaption_prompt": "what it adds depends on the input, so it cannot be merged (peft says so)",
    "lily": "what it adds depends on the input, so it cannot be merged (peft says so)",
    "shadow": "it fails on peft 0.21 with transformers 5.23, and cannot be merged",
    "beft": "it trains biases, which Llama-like models do not have; merging then fails",
    "poly": "it wants a task id with every row",
    "multitask_prompt_tuning": "it wants a task id with every row",
    "xlora": "it mixes adapters that have to exist already. Try: recipe=merge, which makes one model of several",
    "trainable_tokens": "it takes a list of token numbers, for tokens that were added",
    "loftq": "peft's needs CUDA or XPU even for a plain base. Try: method@recipe.tune=qlora recipe.tune.init=loftq",
}
"""The rest of peft's registry, and why it is no method here."""

REFUSED = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "target_modules", "modules_to_save", "bias", "lora_bias", "target_parameters", "trainable_token_indices",
        "layer_replication", "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying",
        "r", "lora_alpha", "lora_dropout", "loftq_config", "arrow_config", "velora_config", "kasa_config",
        "monteclora_config", "alora_invocation_tokens", "use_bdlora", "use_qalora", "qalora_group_size", "total_step",
    }
)  # fmt: skip
"""Keys of peft's configs that are no setting here: what the platform sets, what has a setting of its own, and what makes more
of the adapter than an update of weights."""
