function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGV}\n${output}")
  endif()
endfunction()

set(work ${BUILD}/installed)
set(prefix ${work}/prefix)
file(REMOVE_RECURSE ${work})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
foreach(language C CXX)
  run(${CMAKE_COMMAND} -S ${SOURCE} -B ${work}/${language} -G ${GENERATOR} -DLANGUAGE=${language}
      -DCMAKE_PREFIX_PATH=${prefix})
  run(${CMAKE_COMMAND} --build ${work}/${language})
endforeach()

string(REGEX MATCH "^[0-9]+[.][0-9]+" minor ${VERSION})
if(NOT EXISTS ${prefix}/${LIBDIR}/libtitans.so.${minor})
  message(FATAL_ERROR "no libtitans.so.${minor}")
endif()

separate_arguments(MODULES)
foreach(module ${MODULES})
  if(NOT EXISTS ${prefix}/${LIBDIR}/lib${module}.so)
    message(FATAL_ERROR "no lib${module}.so beside libtitans.so, which looks for it there")
  endif()
endforeach()

find_program(pkg_config pkg-config)
if(NOT pkg_config)
  message(STATUS "no pkg-config, its file is not tested")
  return()
endif()
foreach(variable libdir includedir)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${prefix}/${LIBDIR}/pkgconfig
                  ${pkg_config} --variable=${variable} titans OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  get_filename_component(${variable} "${path}" REALPATH)
endforeach()
if(NOT EXISTS ${libdir}/libtitans.so OR NOT EXISTS ${includedir}/titans/titans.h OR NOT libdir MATCHES "^${prefix}/")
  message(FATAL_ERROR "pkg-config names ${libdir} and ${includedir}, not ${prefix}")
endif()

# A program linked with pkg-config's flags refers to the library by its SONAME.
execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${prefix}/${LIBDIR}/pkgconfig
                ${pkg_config} --cflags --libs titans OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE)
separate_arguments(flags UNIX_COMMAND "${flags}")
run(${COMPILER} ${SOURCE}/version.c ${flags} -o ${work}/version)

# The static library needs nothing of ours at run time.
execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${prefix}/${LIBDIR}/pkgconfig
                ${pkg_config} --static --libs titans OUTPUT_VARIABLE static OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE "-ltitans" "-l:libtitans.a" static "${static}")
separate_arguments(static UNIX_COMMAND "${static}")
run(${COMPILER} ${SOURCE}/version.c -I${prefix}/include ${FLAGS} ${static} -o ${work}/static)
run(${work}/static)

foreach(text LICENSE NOTICES)
  if(NOT EXISTS ${prefix}/share/doc/titans/${text})
    message(FATAL_ERROR "no ${text} in the installation")
  endif()
endforeach()
file(READ ${prefix}/share/doc/titans/NOTICES notices)
foreach(project nlohmann xxHash)
  if(NOT notices MATCHES "${project}")
    message(FATAL_ERROR "no licence of ${project} in NOTICES")
  endif()
endforeach()

# C++14 is refused in one line.
execute_process(COMMAND ${CXX_COMPILER} -std=c++14 -fsyntax-only -I${prefix}/include -x c++ ${prefix}/include/titans/titans.hpp
                RESULT_VARIABLE status ERROR_VARIABLE errors)
string(REGEX MATCHALL "error:" count "${errors}")
list(LENGTH count count)
if(status EQUAL 0 OR NOT count EQUAL 1 OR NOT errors MATCHES "needs C[+][+]17")
  message(FATAL_ERROR "titans.hpp with C++14:\n${errors}")
endif()

find_program(readelf NAMES ${READELF} readelf)
if(readelf)
  execute_process(COMMAND ${readelf} -d ${work}/version OUTPUT_VARIABLE needed)
  if(NOT needed MATCHES "NEEDED[^\n]+\\[libtitans[.]so[.]${minor}\\]")
    message(FATAL_ERROR "a program needs not libtitans.so.${minor} but\n${needed}")
  endif()
endif()
