"""What the tests stand on: real servers, clients that hang up, an OTLP receiver and an in-process driver."""
