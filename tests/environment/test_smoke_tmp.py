import nsbox, os, time
def test_a(env): assert env.run(["true"]).ok
def test_b():
    for _ in range(3): assert nsbox.run(["true"]).ok
def test_c(make_env): make_env(); make_env()
def test_leak_fd(): os.open("/dev/null",0)
def test_leak_env():
    global e
    e=nsbox.ExecutionEnvironment()
def test_closing(): e.close()
def test_cost(_temporary):
    from tests import leaks
    t=time.perf_counter()
    for _ in range(20): leaks.snapshot(_temporary)
    print((time.perf_counter()-t)/20*1e3,"ms")
