"""Answer every row of a file: `gptj8 generate --input rows.csv --output answers.csv`."""
