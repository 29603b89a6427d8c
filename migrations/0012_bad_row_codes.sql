-- What kind of bad row it is, a word of a closed list; and its file by id, where it was by name.

ALTER TABLE dataset_errors ADD COLUMN code text;

UPDATE dataset_errors e SET file = (
    SELECT min(f.id) FROM dataset_files d JOIN files f ON f.id = d.file_id
    WHERE d.dataset_id = e.dataset_id AND f.filename = e.file
);
