"""The prompt table: its files, its columns, and the requests of its rows.

table      open a table, read rows of a file
files      find the files; inspect and read one, whatever its format
parquet    a Parquet file
text       a CSV, TSV, JSON, JSONL or TXT file
inline     rows in the job file itself
file_info  rows, columns and checksum of a file; shared by the formats
requests   rows -> requests, with every value resolved
"""
