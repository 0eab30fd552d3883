module conclave.example/policies/labels

go 1.24
