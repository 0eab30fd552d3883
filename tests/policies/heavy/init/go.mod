module conclave.example/init

go 1.24
