"""Language trunks from `transformers`: T5, and any causal model.

PixelLLM paper, section 3.3: Flan-T5, whose encoder reads visual tokens and context. The
decoder-only trunk, which reads visual tokens, context and words in one causal sequence, is
ours. A third trunk, the official release's BERT-style decoder, is in `pixelllm.models.git`.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from pixelllm.models.roomy_cache import roomy_cache
from pixelllm.models.trunk import Generation, Language, Prompt, join
from pixelllm.weights import extra_gguf_tensors, pretrained_source, refuse_misfits

# The official code adds this to masked attention scores. Unlike -inf it makes a row without any
# valid key an average over all keys.
_MASKED = -1e10


class TransformersLanguage(Language):
    """A trunk around a `transformers` model, which generates through that library.

    Args:
        model: with `lm_head` and an EOS id; of several EOS ids the first is used.
        bos_id: the id the words begin with; None takes EOS.
    """

    def __init__(self, model: PreTrainedModel, bos_id: int | None):
        config = model.config
        if config.eos_token_id is None:
            remedy = "so its captions would never end; set eos_token_id in its config.json"
            raise ValueError(f"this {config.model_type} model has no end token, {remedy}")
        ends = config.eos_token_id
        eos_id = ends if isinstance(ends, int) else ends[0]
        pad_id = eos_id if config.pad_token_id is None else config.pad_token_id
        bos_id = eos_id if bos_id is None else bos_id
        super().__init__(config.hidden_size, config.vocab_size, pad_id, bos_id, eos_id)
        self.model = model
        # Otherwise its penalties and sampling settings would fill in where we set nothing.
        model.generation_config = GenerationConfig()

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(token_ids)

    @abstractmethod
    def _search(self, prompt: Prompt, config: GenerationConfig) -> Tensor:
        """Generated ids with BOS, int64[R, T]."""

    def logits(self, hidden: Tensor) -> Tensor:
        head, config = self.model.lm_head, self.model.config
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            logits = F.linear(hidden.float(), head.weight.float(), bias)
        # What these models do to the head's output, which `generate` goes through as well
        if config.model_type.startswith("cohere"):
            logits = logits * config.logit_scale
        if config.model_type.startswith("granite"):
            logits = logits / config.logits_scaling
        if config.model_type.startswith(("gemma2", "gemma3")):
            cap = config.final_logit_softcapping
            logits = logits if cap is None else (logits / cap).tanh() * cap
        return logits

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        length_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> Generation:
        """Greedy, beam or sampled words through `transformers`, the prompt encoded once.

        The prompt is that of `forward`; `max_new_tokens` counts EOS but not BOS; the others are
        those of `transformers.GenerationConfig`.
        """
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
        beams = {"num_beams": num_beams, "length_penalty": length_penalty} if num_beams > 1 else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            use_cache=use_cache,
            bos_token_id=self.bos_id,
            decoder_start_token_id=self.bos_id,
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            **sampling,
            **beams,
        )
        prompt = self.encode(prefix, context_ids, context_padding)
        return self._finish(prompt, self._search(prompt, config))


class EncoderDecoderLanguage(TransformersLanguage):
    """T5: the encoder reads visual tokens and context, the decoder writes.

    As in the official code, input dropout spares the visual tokens, and the output dropout lies
    between the features and the vocabulary head, so that the points see features without it.

    Args:
        model: T5 or mT5.
        official_masks: mask padding as the official code does, whose fully masked positions
            (EOS and padding as decoder queries, padded context as encoder queries) average over
            all keys. Every other position is the same either way.
    """

    def __init__(self, model: PreTrainedModel, official_masks: bool = False):
        if model.config.model_type not in ("t5", "mt5"):
            raise ValueError(f"{model.config.model_type} is not of the T5 family")
        super().__init__(model, bos_id=model.config.pad_token_id)  # T5 begins with padding
        self.official_masks = official_masks
        # The stacks share one dropout between input and output; it moves into this class.
        self.dropout = nn.Dropout(model.config.dropout_rate)
        model.encoder.dropout.p = model.decoder.dropout.p = 0.0

    def encode(self, prefix: Tensor, context_ids: Tensor, context_padding: Tensor) -> Prompt:
        states, padding = join(prefix, self.dropout(self.embed(context_ids)), context_padding)
        mask = _pair_mask(padding, padding) if self.official_masks else ~padding
        encoded = self.model.encoder(inputs_embeds=states, attention_mask=mask)
        return Prompt(self.dropout(encoded.last_hidden_state), padding)

    def decode(
        self,
        prompt: Prompt,
        token_ids: Tensor,
        token_padding: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        if self.official_masks and token_padding is not None:
            self_mask, cross_mask = _official_decoder_masks(token_padding, prompt.padding)
        else:
            self_mask, cross_mask = None, ~prompt.padding  # causal: padded words come last
        return self.model.decoder(
            inputs_embeds=self.dropout(self.embed(token_ids)),
            attention_mask=self_mask,
            encoder_hidden_states=prompt.states,
            encoder_attention_mask=cross_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def new_cache(self) -> Cache:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def logits(self, hidden: Tensor) -> Tensor:
        # Only the first T5 scales here; Flan-T5 does not.
        scale = self.width**-0.5 if self.model.config.scale_decoder_outputs else 1.0
        return super().logits(self.dropout(hidden) * scale)

    def _search(self, prompt: Prompt, config: GenerationConfig) -> Tensor:
        # The library's own cache has as many layers as the encoder, too few for a deeper decoder.
        cache = {"past_key_values": self.new_cache()} if config.use_cache else {}
        return self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=prompt.states),
            attention_mask=(~prompt.padding).long(),
            generation_config=config,
            **cache,
        )


class DecoderOnlyLanguage(TransformersLanguage):
    """Any causal model: [visual tokens; context; words] in one sequence.

    Padded context is masked and takes no position, so that it may stay in the middle.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, model.config.bos_token_id)

    def encode(self, prefix: Tensor, context_ids: Tensor, context_padding: Tensor) -> Prompt:
        return join(prefix, self.embed(context_ids), context_padding)

    def decode(
        self,
        prompt: Prompt,
        token_ids: Tensor,
        token_padding: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        del token_padding  # causal: padded words come last and are seen by none
        inputs = self.embed(token_ids)
        T = num_words = inputs.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if past:
            num_words += past - prompt.states.shape[1]
        else:
            inputs = torch.cat([prompt.states, inputs], dim=1)
        valid = F.pad(~prompt.padding, (0, num_words), value=True)
        return self.read(inputs, valid, cache)[:, -T:]

    def read(self, inputs: Tensor, valid: Tensor, cache: Cache | None = None) -> Tensor:
        """Features of embeddings that continue what is in the cache, after the final norm.

        Args:
            inputs: float[R, T, D].
            valid: bool[R, S], of the whole sequence; what is not is neither seen nor counted.
                Or bool[R, S, S], what each place sees, itself the last.

        Returns:
            float[R, T, D].
        """
        if valid.ndim == 3:
            positions, mask = valid.sum(2) - 1, torch.zeros_like(valid, dtype=inputs.dtype)
            mask = mask.masked_fill(~valid, torch.finfo(inputs.dtype).min)[:, None]
        else:
            positions, mask = valid.cumsum(1) - 1, valid.long()
        return self.model.base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions.clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def new_cache(self) -> Cache:
        return roomy_cache(self.model.config)

    def _search(self, prompt: Prompt, config: GenerationConfig) -> Tensor:
        bos = torch.full((len(prompt.states), 1), self.bos_id, device=prompt.states.device)
        inputs = torch.cat([prompt.states, self.embed(bos)], dim=1)
        valid = F.pad(~prompt.padding, (0, 1), value=True)
        words = self.model.generate(
            inputs_embeds=inputs, attention_mask=valid.long(), generation_config=config
        )
        return torch.cat([bos, words], dim=1)


def load_trunk(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32
) -> EncoderDecoderLanguage | DecoderOnlyLanguage:
    """A pretrained trunk from a Hub id, a local folder or a GGUF file, see `pretrained_source`.

    Weights that GGUF holds in blocks of few bits become plain ones, so that LoRA can train on them.

    Raises:
        OSError: there is no such model, or a shard of it is missing.
        ValueError: an encoder-decoder that is not of the T5 family, a damaged file, or weights that
            are missing, unexpected or misshapen.
    """
    source, options = pretrained_source(name_or_path)
    loading = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    if "gguf_file" in options:
        loading["quantization_config"] = GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, found = kind.from_pretrained(source, config=config, **loading, **options)
    except (SafetensorError, struct.error, ValueError, LookupError) as error:
        raise ValueError(f"{name_or_path}: not a readable language model: {error}") from error
    odd = [(key, *map(tuple, shapes)) for key, *shapes in sorted(found["mismatched_keys"])]
    extra = sorted(found["unexpected_keys"])
    if "gguf_file" in options:
        extra += extra_gguf_tensors(Path(source, options["gguf_file"]), model)
    refuse_misfits(str(name_or_path), sorted(found["missing_keys"]), extra, odd)
    wrapper = EncoderDecoderLanguage if config.is_encoder_decoder else DecoderOnlyLanguage
    return wrapper(model)


def build_t5(
    vocab_size: int,
    width: int,
    num_encoder_layers: int,
    num_decoder_layers: int,
    num_heads: int,
    ff: int,
    dropout: float = 0.1,
    head_dim: int | None = None,
    official_masks: bool = False,
) -> EncoderDecoderLanguage:
    """A T5 of the Flan kind (gated GELU, separate vocabulary head) with random weights.

    The head starts at std D^-0.5, so that the first logits have unit variance; with the
    library's 1.0 a small model does not learn. Ids: padding and BOS 0, EOS 1.
    """
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=head_dim or width // num_heads,
        d_ff=ff,
        num_layers=num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        num_heads=num_heads,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu_pytorch_tanh",  # Flan's gelu_new in one kernel
        tie_word_embeddings=False,
        # Faster than sdpa for small models on a CPU: the position bias needs a gradient.
        attn_implementation="eager",
    )
    return EncoderDecoderLanguage(_random_t5(config), official_masks)


def _random_t5(config: T5Config) -> T5ForConditionalGeneration:
    """A T5 of the given sizes; those whose output is not scaled have a head of their own."""
    model = T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:
        # The library ties the head to the embedding whatever the config says.
        model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
        model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def build_trunk(config: PretrainedConfig) -> EncoderDecoderLanguage | DecoderOnlyLanguage:
    """The trunk of a `transformers` configuration with random weights, to load others into."""
    if config.is_encoder_decoder:
        return EncoderDecoderLanguage(_random_t5(config))
    return DecoderOnlyLanguage(AutoModelForCausalLM.from_config(config))


def add_lora(
    trunk: TransformersLanguage,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
) -> None:
    """Freeze the trunk and add low-rank factors (scale alpha / rank) to its `targets`, in place.

    Args:
        targets: ends of module names, e.g. ("q", "v") for T5's three kinds of attention.
    """
    factors = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    config = LoraConfig(**factors, target_modules=list(targets), bias="none")
    inject_adapter_in_model(config, trunk.model)  # freezes everything else


def _pair_mask(query_padding: Tensor, key_padding: Tensor) -> Tensor:
    """bool[R, Q], bool[R, S] -> float32[R, 1, Q, S], 0 where both are valid."""
    masked = query_padding[:, None, :, None] | key_padding[:, None, None, :]
    return torch.zeros(masked.shape, device=masked.device).masked_fill(masked, _MASKED)


def _official_decoder_masks(token_padding: Tensor, prompt_padding: Tensor) -> tuple[Tensor, Tensor]:
    """Self and cross attention masks from the targets: a word before padding is padding too."""
    no_target = F.pad(token_padding[:, 1:], (0, 1), value=True)
    T = no_target.shape[1]
    future = torch.ones(T, T, dtype=torch.bool, device=no_target.device).triu(1)
    self_mask = _pair_mask(no_target, no_target).masked_fill(future, _MASKED)
    return self_mask, _pair_mask(no_target, prompt_padding)
