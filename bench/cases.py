"""The registry: which contenders there are and where."""

# Name: module, class, arguments. Modules are imported when one of their contenders is asked for.
CONTENDERS: dict[str, tuple[str, str, dict]] = {
    "ours": ("bench.ours", "Ours", {"impl": "auto"}),
    "ours_cpu": ("bench.ours", "Ours", {"impl": "cpu"}),
    "ours_pytorch": ("bench.ours", "Ours", {"impl": "pytorch"}),
    "ours_dense": ("bench.ours", "Ours", {"impl": "auto", "route": "dense"}),
    "dense": ("bench.peers", "DensePyTorch", {}),
    "dense_compiled": ("bench.peers", "DensePyTorch", {"compiled": True}),
    "embedding_bag": ("bench.peers", "EmbeddingBag", {}),
    "torch_sparse": ("bench.peers", "TorchSparse", {}),
    "saelens": ("bench.peers_saelens", "SAELens", {}),
    "saelens_autocast": ("bench.peers_saelens", "SAELens", {"autocast": True}),
    "saelens_compiled": ("bench.peers_saelens", "SAELens", {"compiled": True}),
    "dictionary_learning": ("bench.peers_dictionary_learning", "DictionaryLearning", {}),
    "sparsify": ("bench.peers_sparsify", "Sparsify", {}),
}
