"""Configuration of the Q-Former."""

from transformers import PreTrainedConfig


class BliprenQFormerConfig(PreTrainedConfig):
    r"""Configuration of the Q-Former (BLIP-2, https://arxiv.org/abs/2301.12597, section 3.1).

    Args:
        hidden_size (`int`, defaults to 768): width of queries and text.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): heads of self- and cross-attention.
        intermediate_size (`int`, *optional*): width of the feed-forward; four times `hidden_size` by default.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, defaults to 0.1): dropout.
        layer_norm_eps (`float`, defaults to 1e-12): epsilon of every layer norm.
        initializer_range (`float`, defaults to 0.02): standard deviation of new linear weights.
        num_query_tokens (`int`, defaults to 32): learned queries, as many as visual tokens of an image.
        query_init_std (`float`, defaults to 0.02): standard deviation of new queries.
        cross_attention_frequency (`int`, defaults to 2): every k-th layer cross-attends to the image.
        cross_attention_offset (`int`, defaults to 0): first layer that cross-attends.
        query_feed_forward (`str`, defaults to `"every_layer"`): `"every_layer"`: queries have their own feed-forward,
            apart from the text's (BLIP-2); `"after_cross_attention"`: they share the text's in every layer, and have
            their own behind each cross-attention, which then follows the feed-forward (the two-stage tutorial).
        norm_position (`str`, defaults to `"post"`): `"post"` as in BERT and BLIP-2, or `"pre"` with a final norm.
        normalize_queries (`bool`, defaults to `True`): apply BERT's norm of the embeddings to the queries too, with
            `"post"` (BLIP-2).
        normalize_keys (`bool`, defaults to `False`): apply the norm in front of a cross-attention to the patch features
            too, with `"pre"` (the BLIPren notebooks).
        cross_attention_norm_eps (`float`, *optional*): epsilon of the norms of cross-attention and of a feed-forward
            behind it; `layer_norm_eps` by default.
        encoder_hidden_size (`int`, defaults to 1408): width of the patch features.
        project_patches (`bool`, defaults to `False`): map patch features linearly to `hidden_size` once, before the
            blocks, instead of in every cross-attention's keys and values.
        normalize_patches (`bool`, defaults to `False`): apply a layer norm to patch features, for convolutional encoders,
            whose layers differ in scale.
        num_pieces (`int`, defaults to 1): pieces of an image along the sequence. With more than one, a learned embedding
            of the piece (its scale and place) is added to its patches.
        patches_per_piece (`int`, *optional*): patches of a piece, where there are several.
        patch_position_embeddings (`bool`, defaults to `False`): add a learned embedding of its place in the grid to each
            patch. Encoders that were trained on what is in an image hold only roughly where it is.
        num_patches (`int`, *optional*): patches of an image, for `patch_position_embeddings`.
        time_embedding (`str`, *optional*): for videos whose frames are read together, added to the patches of a frame:
            `"sinusoidal"` or `"learned"` by its place among the frames, or `"seconds"`, sinusoids of its time in seconds,
            which stands in a last column of the patch features.
        time_embedding_scale (`float`, defaults to 1.0): factor of the sinusoids, whose length is the square root of half
            their width. Where patch features are longer, a larger factor lets queries tell neighbouring frames apart.
        num_frames (`int`, *optional*): frames of a video, for the learned time embedding.
        patches_per_frame (`int`, *optional*): patches of a frame, over all of its pieces.
        use_text (`bool`, defaults to `False`): build the text side (embeddings and text feed-forward) for stage 1.
        vocab_size, max_position_embeddings, pad_token_id (`int`): of the text side.
        decoder_start_token_id (`int`, *optional*): token that replaces the first one in image-grounded generation
            (ITG), so that the Q-Former can tell it from contrast and matching; `None` keeps the first token.
    """

    model_type = "blipren_qformer"
    base_config_key = "qformer_config"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        num_query_tokens: int = 32,
        query_init_std: float = 0.02,
        cross_attention_frequency: int = 2,
        cross_attention_offset: int = 0,
        query_feed_forward: str = "every_layer",
        norm_position: str = "post",
        normalize_queries: bool = True,
        normalize_keys: bool = False,
        cross_attention_norm_eps: float | None = None,
        encoder_hidden_size: int = 1408,
        project_patches: bool = False,
        normalize_patches: bool = False,
        num_pieces: int = 1,
        patches_per_piece: int | None = None,
        patch_position_embeddings: bool = False,
        num_patches: int | None = None,
        time_embedding: str | None = None,
        time_embedding_scale: float = 1.0,
        num_frames: int | None = None,
        patches_per_frame: int | None = None,
        use_text: bool = False,
        vocab_size: int = 30522,
        max_position_embeddings: int = 512,
        pad_token_id: int = 0,
        decoder_start_token_id: int | None = None,
        **kwargs,
    ):
        if norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position is {norm_position!r}; it must be 'pre' or 'post'")
        if query_feed_forward not in ("every_layer", "after_cross_attention"):
            raise ValueError(
                f"query_feed_forward is {query_feed_forward!r}; it must be 'every_layer' or 'after_cross_attention'"
            )
        if patch_position_embeddings and num_patches is None:
            raise ValueError("patch_position_embeddings needs num_patches, an equal number of patches of every image")
        if normalize_keys and not project_patches:
            raise ValueError("normalize_keys needs project_patches: the norm is as wide as the queries")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        if not 0 <= cross_attention_offset < num_hidden_layers:
            raise ValueError(
                f"cross_attention_offset {cross_attention_offset} must be less than num_hidden_layers "
                f"{num_hidden_layers}: otherwise no layer cross-attends to the image"
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size if intermediate_size is not None else 4 * hidden_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.num_query_tokens = num_query_tokens
        self.query_init_std = query_init_std
        self.cross_attention_frequency = cross_attention_frequency
        self.cross_attention_offset = cross_attention_offset
        self.query_feed_forward = query_feed_forward
        self.norm_position = norm_position
        self.normalize_queries = normalize_queries
        self.normalize_keys = normalize_keys
        self.cross_attention_norm_eps = cross_attention_norm_eps
        self.encoder_hidden_size = encoder_hidden_size
        self.project_patches = project_patches
        self.normalize_patches = normalize_patches
        self.num_pieces = num_pieces
        self.patches_per_piece = patches_per_piece
        self.patch_position_embeddings = patch_position_embeddings
        self.num_patches = num_patches
        if time_embedding not in (None, "sinusoidal", "learned", "seconds"):
            raise ValueError(f"time_embedding is {time_embedding!r}; it must be 'sinusoidal', 'learned' or 'seconds'")
        self.time_embedding = time_embedding
        self.time_embedding_scale = time_embedding_scale
        self.num_frames = num_frames
        self.patches_per_frame = patches_per_frame
        self.use_text = use_text
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.decoder_start_token_id = decoder_start_token_id
        super().__init__(pad_token_id=pad_token_id, **kwargs)
