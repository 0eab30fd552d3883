module conclave.example/reactor

go 1.24
