"""The prompt table: its files, its columns, and the requests of its rows.

table      open a table, read rows of a file
columns    what columns mean: keys, near misses, names that collide
captions   prompts in lists
extras     the table's own columns: types that every reader of the output opens
check      what the rows will be drawn as, before anything is drawn
files      find the files; inspect and read one, whatever its format
folders    what of a folder is a table, and what is left
formats    which format a file has, by its name or its content
parquet    a Parquet file
arrow      an Arrow file or stream
text       a text file: opened, decompressed, decoded, in lines
separated  CSV and TSV
objects    JSON and JSON Lines
lines      a prompt per line
webdataset a WebDataset tar file
caption_files a folder with a file for each prompt
inline     rows in the job file itself
rows       rows of text and of the job: their columns, the rows that cannot be read
fit        columns of Parquet and Arrow as the table has them
pictures   the pictures of rows: found, fetched, fitted
types      the types of columns, united and converted
frozen     the types of an output that files are added to
file_info  rows, columns and checksum of a file; shared by the formats
sizes      the largest image that the rows ask for
requests   rows -> requests, with every value resolved
"""
