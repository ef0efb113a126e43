"""`openvision tokenizer`: train a WordPiece vocabulary, show token ids."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a WordPiece vocabulary; show token ids.", no_args_is_help=True)


@app.command()
def train(
    source: Annotated[Path, typer.Argument(help="Folder of shards, or a text file with one text per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Maximum number of entries.", min=100)] = 32000,
) -> None:
    """Train a vocabulary on the texts of shards or of a text file."""
    from openvision.data.shards.dataset import ShardDataset, all_texts
    from openvision.errors import OpenVisionError
    from openvision.files import make_folder
    from openvision.text.tokenizer import Tokenizer

    if source.is_dir():
        texts = list(all_texts(ShardDataset(source)))
    elif source.is_file():
        texts = source.read_text(encoding="utf-8", errors="replace").splitlines()
    else:
        raise OpenVisionError(f"{source} is neither a folder of shards nor a text file")
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(make_folder(output))
    typer.echo(f"{tokenizer.vocab_size} entries from {len(texts)} texts: {output / 'tokenizer.json'}")


@app.command()
def encode(
    text: Annotated[str, typer.Argument(help="Text to tokenize.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, a folder with one, or a vocab.txt.")],
    length: Annotated[int, typer.Option(help="Number of ids, padding and class token included.", min=4)] = 80,
) -> None:
    """Show the token ids that a text tower reads."""
    from openvision.text.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    typer.echo(" ".join(str(index) for index in loaded.encode([text], length)[0]))
