module conclave.example/readers

go 1.25
